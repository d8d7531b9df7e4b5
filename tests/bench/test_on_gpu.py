"""What the bench does on a GPU, shown without one: rows of steps, passes, traces, plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from typer.testing import CliRunner

from bench import __main__ as main
from bench import cases, harness, profiling, results, rivals, table, timing, work
from bench.part import How, Todo
from bench.parts import explain, steps, trace
from tests.bench.support import TINY

pytestmark = pytest.mark.filterwarnings("ignore")
_CPU = torch.device("cpu")


class _Gpu:
    """A GPU of a single queue, and the host beside it, whose times a test sets."""

    def __init__(self) -> None:
        self.host = self.queue = 0.0
        self.flushes: list[float] = []

    def launch(self, host: float, device: float) -> None:
        """Work that occupies the host, and then the device."""
        self.host += host
        self.queue = max(self.queue, self.host) + device

    def synchronize(self, device: object = None) -> None:
        self.host = max(self.host, self.queue)

    def flush(self, device: torch.device) -> SimpleNamespace:
        def zero_() -> None:
            self.launch(0.0, 0.5)
            self.flushes.append(self.queue)

        return SimpleNamespace(zero_=zero_)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", max(self.queue, self.host))
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> _Gpu:
    gpu = _Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(timing, "_flush", gpu.flush)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: gpu.host)
    return gpu


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a test is remembered for a measurement."""
    monkeypatch.setattr(work, "STATE", tmp_path / "state")


def test_a_step_bound_by_its_launches_takes_as_long_as_they_do(gpu: _Gpu) -> None:
    clock = timing.RowClock(torch.device("cuda"))
    slow_launches: Callable[[], None] = partial(gpu.launch, 0.02, 0.001)
    assert clock(slow_launches).wall == pytest.approx((5 * 0.02 + 0.001) / 5)
    assert clock(slow_launches).host == pytest.approx(0.02)
    slow_kernels: Callable[[], None] = partial(gpu.launch, 0.001, 0.02)
    assert clock(slow_kernels).wall == pytest.approx((0.001 + 5 * 0.02) / 5)
    assert clock(slow_kernels).host == pytest.approx(0.001)
    assert len(gpu.flushes) == 4


def test_a_row_of_long_steps_is_short(gpu: _Gpu) -> None:
    clock, calls = timing.RowClock(torch.device("cuda")), []

    def step() -> None:
        calls.append(1)
        gpu.launch(0.4, 0.4)

    assert clock(step).wall == pytest.approx(0.6)
    assert len(calls) == 2


def test_a_single_call_hides_its_launch_behind_the_flush(gpu: _Gpu) -> None:
    clock = timing.CallClock(torch.device("cuda"))
    assert clock(partial(gpu.launch, 0.02, 0.001)).wall == pytest.approx(0.001)


def test_the_passes_share_the_ordinary_step_and_nothing_else() -> None:
    first, second = ({r.name for r in steps.of_pass(name)} for name in steps.PASSES)
    assert first == {"ordinary", "ours", "loop"}
    assert first & second == {"ordinary"}
    assert first | second == {rival.name for rival in rivals.RIVALS}
    with pytest.raises(ValueError, match=r"pass 'third': expected one of first, second"):
        steps.of_pass("third")


def test_the_second_pass_leaves_the_rows_of_the_first(tmp_path: Path) -> None:
    path, plan = tmp_path / "rows.csv", harness.Plan(0.0, None, 1, 1, memory=False)

    def run(*names: str) -> work.Outcome:
        return steps.PART.run(steps.of_cases([TINY], rivals.find([*names]), plan, How(path)))

    assert run("ours", "loop").complete
    before = {row.rival: row for row in results.read(path)}
    assert run("ghost").complete
    after = {row.rival: row for row in results.read(path)}
    assert set(after) == {"ordinary", "ours", "loop", "ghost"}
    assert {name: after[name] for name in before} == before


def test_a_pass_measures_its_rivals_and_not_those_a_case_leaves_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[list[str], bool]] = []

    def of_cases(wanted, chosen, plan, how) -> Todo:
        asked.append(([rival.name for rival in chosen], plan.everyone))
        return Todo({}, how)

    monkeypatch.setattr(steps, "of_cases", of_cases)
    output = ["--output", str(tmp_path / "rows.csv")]
    assert CliRunner().invoke(main.app, ["--pass", "first", *output]).exit_code == 0
    assert asked == [(["ordinary", "ours", "loop"], False)]
    for wrong in (["--pass", "third"], ["--pass", "first", "--rival", "ours"]):
        assert CliRunner().invoke(main.app, [*wrong, *output]).exit_code == 2
    assert len(asked) == 1


def test_each_kind_of_network_comes_before_the_second_of_its_kind() -> None:
    kinds = [case.name.split("-")[0].rstrip("0123456789") for case in cases.find([], "gpu")]
    assert len(set(kinds[: len(set(kinds))])) == len(set(kinds)) == 4


def test_what_is_left_of_the_budget_bounds_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.time, "monotonic", lambda: 100.0)
    plan = harness.Plan(case_seconds=45.0)
    assert steps._until(plan, None) == plan
    assert steps._until(plan, 120.0).case_seconds == 20.0
    assert steps._until(plan, 900.0).case_seconds == 45.0
    unbounded = replace(plan, case_seconds=None)
    assert steps._until(unbounded, 120.0) == unbounded


def test_a_device_is_busy_while_at_least_one_kernel_runs() -> None:
    spans = [(0.0, 2.0), (1.0, 3.0), (3.5, 4.0), (8.0, 9.0), (8.2, 8.4)]
    seen = profiling.Recorded(2, [profiling.Event("k", *span) for span in spans], [])
    assert seen.busy == pytest.approx(4.5 / 2)
    assert seen.gaps(0.0) == pytest.approx([0.5, 4.0])
    assert seen.gaps(1.0) == pytest.approx([4.0])


def test_of_the_events_of_a_gpu_its_work_counts_and_the_waits_within_the_steps() -> None:
    def event(name: str, begin: float, end: float, on_gpu: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            time_range=SimpleNamespace(start=1e6 * begin, end=1e6 * end),
            device_type=DeviceType.CUDA if on_gpu else DeviceType.CPU,
            is_user_annotation=name in (profiling._STEPS, "Optimizer.step"),
            cpu_parent=None,
        )

    events = [
        event(profiling._STEPS, 0.0, 10.0),
        event(profiling._STEPS, 0.5, 11.0, on_gpu=True),
        event("Optimizer.step", 3.0, 4.0),
        event("Optimizer.step", 3.5, 9.0, on_gpu=True),
        event("aten::mm", 1.0, 2.0),
        event("gemm", 1.5, 2.5, on_gpu=True),
        event("Memcpy DtoH (Device -> Pageable)", 3.0, 3.5, on_gpu=True),
        event("Stream Sync", 0.0, 11.0, on_gpu=True),
        event("cudaLaunchKernel", 1.1, 1.2),
        event("cudaStreamSynchronize", 3.0, 3.6),
        event("cudaDeviceSynchronize", 10.1, 11.0),
    ]
    seen = profiling._recorded(events, 2, on_gpu=True)
    assert [e.name for e in seen.events] == ["gemm", "Memcpy DtoH (Device -> Pageable)"]
    assert seen.busy == pytest.approx(1.5 / 2)
    assert seen.waits == pytest.approx([0.6])


def test_kernels_keep_what_tells_them_apart_of_their_names() -> None:
    full = (
        "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::"
        "Add(float)::{lambda(float)#1}>(int, at::native::Add(float))"
    )
    shortened = "vectorized_elementwise_kernel<4, Add(float)::{lambda(float)#1}>"
    assert profiling.short(full) == shortened
    assert profiling.short("linear_gram_kernel") == "linear_gram_kernel"
    assert len(profiling.short("k" * 500)) == profiling._LONGEST


def test_a_trace_has_both_rivals_kernel_by_kernel(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    assert trace.PART.run(trace.of_cases([TINY], How(path))).complete
    rows = table.read(path)
    assert {(row["case"], row["rival"]) for row in rows} == {("tiny", "ordinary"), ("tiny", "ours")}
    for rival in trace.RIVALS:
        own = [row for row in rows if row["rival"] == rival]
        named = {row["name"]: row for row in own if row["kind"] != "kernel"}
        kernels = [row for row in own if row["kind"] == "kernel"]
        assert sum(float(row["share"]) for row in kernels) == pytest.approx(1.0, abs=1e-2)
        assert "aten::embedding" in {row["name"] for row in kernels}
        counted = sum(float(row["calls"]) for row in kernels)
        assert float(named["kernels"]["calls"]) == pytest.approx(counted, rel=1e-2)
        busy, wall = float(named["busy"]["us"]), float(named["wall"]["us"])
        assert float(named["busy"]["share"]) == pytest.approx(busy / wall, rel=1e-2)


def test_kernels_beyond_the_longest_are_counted_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "trace.csv"
    monkeypatch.setattr(trace, "_NAMED", 2)
    trace.PART.run(trace.of_cases([TINY], How(path)))
    own = [r for r in table.read(path) if r["rival"] == "ours" and r["kind"] == "kernel"]
    assert len(own) == 3
    assert own[-1]["name"].endswith(" others")
    assert sum(float(row["share"]) for row in own) == pytest.approx(1.0, abs=1e-2)


def test_a_step_that_cannot_be_traced_has_its_reason_and_the_other_its_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(workload: cases.Workload, privacy: rivals.Privacy) -> rivals.Trainer:
        raise ValueError("no such layer")

    path = tmp_path / "trace.csv"
    ordinary, ours = rivals.find(["ours"])
    chosen = [ordinary, replace(ours, prepare=failing)]
    monkeypatch.setattr(rivals, "find", lambda names: chosen)
    assert trace.PART.run(trace.of_cases([TINY], How(path))).complete
    found = {name: [r for r in table.read(path) if r["rival"] == name] for name in trace.RIVALS}
    assert [(row["kind"], row["name"]) for row in found["ours"]] == [
        ("time", "cannot run: no such layer"),
        ("step", "cannot run: no such layer"),
    ]
    assert len(found["ordinary"]) > len(found["ours"])
    monkeypatch.undo()
    monkeypatch.setattr(work, "STATE", tmp_path / "state")
    trace.PART.run(trace.of_cases([TINY], How(path)))
    assert "cannot run" not in path.read_text()


def test_a_plan_is_written_case_by_case_and_a_failing_case_has_its_reason(tmp_path: Path) -> None:
    def failing() -> torch.nn.Module:
        raise ValueError("no such layer")

    path = tmp_path / "explain.csv"
    broken = replace(TINY, name="broken", make_model=failing)
    assert explain.PART.run(explain.of_cases([broken, TINY], How(path))).complete
    rows = table.read(path)
    assert [row["status"] for row in rows if row["case"] == "broken"] == [
        "cannot run: no such layer"
    ]
    planned = {row["parameter"]: row for row in rows if row["case"] == "tiny"}
    assert set(planned) == {name for name, _ in TINY.make_model().named_parameters()}
    assert all(row["status"] == "ok" and row["strategy"] for row in planned.values())
    assert "only convolutions" in planned["mlp.0.weight"]["why_not"]


def test_trace_and_explain_are_commands(tmp_path: Path) -> None:
    for command in ("trace", "explain"):
        path = tmp_path / f"{command}.csv"
        arguments = [command, "--output", str(path)]
        chosen = [*arguments, "--case", "recommender-b256"]
        assert CliRunner().invoke(main.app, chosen).exit_code == 0
        assert {row["case"] for row in table.read(path)} == {"recommender-b256"}
        assert CliRunner().invoke(main.app, [*arguments, "--case", "x"]).exit_code == 2
        assert CliRunner().invoke(main.app, [*arguments, "--device", "x"]).exit_code == 2


def test_the_share_of_busy_time_is_of_the_step_as_timed_without_the_profiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = profiling.Recorded(5, [profiling.Event("k", 0.0, 0.010)], [])
    monkeypatch.setattr(profiling, "record", lambda step, steps, device: seen)
    workload = TINY.build(_CPU)
    row = harness._row(rivals.find(["ours"])[1], workload)
    rows = [replace(row, ms=8.0), replace(row, rival="loop", ms=9.0)]
    (found,) = harness.profiled(rows, TINY, _CPU, work.SILENT)
    assert (found.rival, found.busy) == ("ours", pytest.approx(2.0 / 8.0))


def test_a_case_that_ended_a_process_has_a_row_for_every_rival(tmp_path: Path) -> None:
    path, status = tmp_path / "rows.csv", "ended the process (exit status unknown): not tried again"
    chosen, plan = rivals.find(["ours", "loop"]), harness.Plan(0.0, None, 1, 1, memory=False)
    todo = steps.of_cases([TINY], chosen, plan, How(path))
    here = todo.how.here()
    table.replace(path, [{**row, **here} for row in todo.lost("tiny", status)], results.KEY)
    rows = results.read(path)
    assert [(row.rival, row.status) for row in rows] == [(r.name, status) for r in chosen]
    assert {row.parameters for row in rows} == {TINY.build(_CPU).parameters()}
    steps.PART.run(todo)
    assert {row.status for row in results.read(path)} == {"ok"}
