"""The other parts of the bench: what they compute is right, and what is wrong they find."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import __main__ as main
from bench import (
    calls,
    cases,
    harness,
    memory,
    pictures,
    report,
    results,
    rivals,
    table,
    targets,
    work,
)
from bench.layers import Conv, Linear
from bench.part import How, Part
from bench.parts import accounting, dice, noise, ops, regret, scaling
from dpkernels.layers.operands import LinearOperand
from dpkernels.segmentation.phantom import LIVER

pytestmark = pytest.mark.filterwarnings("ignore")
_PLAN = harness.Plan(seconds=0.0, least=1, most=1, memory=False)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a test is remembered for a measurement, nor the other way round."""
    monkeypatch.setattr(work, "STATE", tmp_path / "state")


def _row(rival: str, ratio: float, case: str = "encoder-t128-d256-b8") -> results.Row:
    return results.Row(
        case, rival, "ok", 8, 3, "float32", "", "1", ratio=ratio, device="cpu", threads=1
    )


def test_a_table_keeps_the_rows_and_columns_of_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    table.replace(path, [{"case": "a", "old": 1}, {"case": "b", "old": 2}], ("case",))
    table.replace(path, [{"case": "b", "new": 0.123456}], ("case",))
    assert table.read(path) == [
        {"new": "", "case": "a", "old": "1"},
        {"new": "0.1235", "case": "b", "old": ""},
    ]


def test_an_interrupted_part_goes_on_and_a_changed_one_starts_anew() -> None:
    seen: list[str] = []

    def item(name: str, report: work.Report) -> None:
        seen.append(name)
        if name == "b" and seen.count("b") == 1:
            raise RuntimeError("no luck")

    todo = {name: partial(item, name) for name in "abc"}
    first = work.off(todo, "part", {"n": 1})
    assert first == work.Outcome(failed=("b",))
    assert work.off(todo, "part", {"n": 1}).complete
    assert seen == ["a", "b", "c", "b"]
    assert work.off(todo, "part", {"n": 1}, budget=-1.0).left == ("a", "b", "c")
    work.off({"a": todo["a"], "x": partial(item, "b")}, "part", {"n": 1}, budget=-1.0)
    assert seen == ["a", "b", "c", "b"]


def test_what_was_done_with_other_settings_is_done_again() -> None:
    todo = {"a": lambda report: None, "b": partial(_fail)}
    work.off(todo, "part", {"n": 1})
    assert work.Memory(work.STATE / "part.json", {"n": 1}).done == ["a"]
    assert work.Memory(work.STATE / "part.json", {"n": 2}).done == []
    assert work.Memory(work.STATE / "part.json", {"n": 1}, fresh=True).done == []


def test_what_another_commit_did_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    path = work.STATE / "part.json"
    work.Memory(path, {}).add("a")
    assert work.Memory(path, {}).done == ["a"]
    monkeypatch.setattr(results, "commit", lambda: "another")
    assert work.Memory(path, {}).done == []


def _fail(report: work.Report) -> None:
    raise ValueError("no")


@pytest.mark.parametrize("part", [part for part in main.PARTS if part.path.exists()])
def test_every_committed_row_has_an_item_that_makes_it(part: Part) -> None:
    item_of = {
        "time-to-dice": lambda row: f"repetition {row['repetition']}",
        "regret": lambda row: row["shape"],
        "ops": lambda row: f"{row['op']} {row['shape']} {row['precision']}",
        "noise": lambda row: row["quantity"],
        "accounting": lambda row: f"{row['run']}, epsilon {float(row['nominal_epsilon']):g}",
    }.get(part.name, lambda row: row["case"])
    rows = table.read(part.path)
    assert len({tuple(row[column] for column in part.key) for row in rows}) == len(rows)
    made = {item_of(row) for row in rows}
    items = set(part.todo(How(part.path)).items)
    if part.name == "noise":  # an item has many quantities
        items = {f.quantity for f in (*noise.throughput(), *noise.distribution(10_000))}
        made = {quantity for quantity in made if not quantity.startswith("P(")}
    assert made <= items
    assert made == items or part.name == "scaling", "its curves are coarse in `all`"


def test_the_parts_fit_into_half_an_hour() -> None:
    assert sum(part.seconds or 0.0 for part in main.PARTS) <= main._WHOLE < 30 * 60


def test_all_goes_on_with_the_parts_that_are_not_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    def finished(part: Part, limit: float, fresh: bool) -> bool:
        asked.append((part.name, limit))
        return len(asked) != 2

    parts = [replace(noise.PART, name=name, seconds=10.0) for name in "abc"]
    monkeypatch.setattr(main, "PARTS", (*parts, replace(noise.PART, name="d", seconds=None)))
    monkeypatch.setattr(main, "_finished", finished)
    monkeypatch.setattr(main, "_write_reports", lambda: None)
    assert CliRunner().invoke(main.app, ["all", "--seconds", "1000"]).exit_code == 1
    assert CliRunner().invoke(main.app, ["all", "--seconds", "1000"]).exit_code == 0
    assert [name for name, _ in asked] == ["a", "b", "c", "b"]
    assert all(limit == 20.0 for _, limit in asked)
    assert CliRunner().invoke(main.app, ["all", "--seconds", "0"]).exit_code == 1
    assert len(asked) == 4


def test_regret_is_the_chosen_time_over_that_of_the_best_found_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operand = LinearOperand(torch.randn(4, 3, 64), torch.randn(4, 3, 64))

    def times(calls, seconds, others):
        search = dict.fromkeys(calls, 2.0) | {"store, auto": 1.0}
        judge = dict.fromkeys(calls, 0.1) | {"store, auto": 2.0, "gram, auto": 3.0}
        return search, judge

    monkeypatch.setattr(regret, "_interleaved", times)
    row = regret.measure(operand, torch.zeros(64, 64))
    assert row["chosen"] == "gram, auto"
    assert row["best"] == "store, auto"
    assert row["regret"] == 0.5


def test_every_candidate_gives_the_same_clipped_sum() -> None:
    torch.manual_seed(0)
    conv = regret.grid()["conv B=4 128->128 4^3 k=3 s=1"]()
    for operand in (LinearOperand(torch.randn(4, 5, 8), torch.randn(4, 5, 6)), conv):
        parameter = regret._parameter(operand)
        found = [call()() for call in regret._candidates(operand, parameter).values()]
        assert len(found) >= 3
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=2e-3, atol=1e-4)


def test_a_small_grid_of_regret_is_written_and_told(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "regret.csv"
    monkeypatch.setattr(
        regret, "grid", lambda: {"tiny": lambda: regret._of_layer(Linear(2, 3, 4, 5))}
    )
    monkeypatch.setattr(regret, "_SECONDS", 0.01)
    assert regret.PART.run(regret.todo(How(path))).complete
    counted, measured = regret.digest(table.read(path))
    assert "of 1 shapes, at most" in counted
    assert "above 10% at" in counted
    assert measured.startswith('Regret, plan="measured" over')


def test_noise_passes_its_tests_and_wrong_noise_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def worst(findings: list[noise.Finding], what: str) -> float:
        return max(abs(f.deviation or 0.0) for f in findings if what in f.quantity)

    good = noise.distribution(400_000)
    assert worst(good, "mean of") < 5
    assert worst(good, "distance") < 2.3
    honest = noise._normals

    def scaled(draws: int):
        return (chunk * 1.02 for chunk in honest(draws))

    monkeypatch.setattr(noise, "_normals", scaled)
    bad = noise.distribution(400_000)
    assert worst(bad, "mean of") > 5
    assert worst(bad, "distance") > 2.3


def test_far_tails_are_exact_and_a_cut_tail_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_FAR_BLOCKS", 1 << 14)
    assert max(abs(f.deviation or 0.0) for f in noise.far_tails()) < 5
    honest = noise.standard_normals
    monkeypatch.setattr(noise, "standard_normals", lambda w: honest(w).clamp(-7.2, 7.2))
    deviations = {f.quantity[:11]: f.deviation or 0.0 for f in noise.far_tails()}
    assert abs(deviations["P(|z| > 7),"]) < 5
    assert deviations["P(|z| > 8),"] < -20


def test_a_roofline_is_the_slower_of_bytes_and_flops() -> None:
    peaks = ops.Peaks(bandwidth=100.0, flops=1000.0)
    call = calls.Call(lambda: torch.zeros(1), (), flops=500.0, bytes=200.0)
    row = peaks.figures(call, seconds=4.0)
    assert (row["roofline_ms"], row["bound"], row["share"]) == (2e3, "memory", 0.5)
    assert (row["ms"], row["gbytes_per_s"]) == (4e3, pytest.approx(50e-9))
    assert peaks.figures(replace(call, flops=3000.0), seconds=4.0)["bound"] == "arithmetic"


def test_ops_are_told_by_their_share_of_the_roofline_and_the_batch(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    shares = {"a": 0.5, "b": 0.9, "c": 0.7, "d": 1.1}
    same = {
        "device": "cpu",
        "op": "conv_grad_sample",
        "rank": 0,
        "status": "ok",
        "ms": 1.1,
        "backend": "cpu",
    }
    same |= {"peak_gflops": 9, "peak_gbytes_per_s": 2, "precision": "float32"}
    rows = [{**same, "shape": s, "share": share, "batch_ms": ""} for s, share in shares.items()]
    others = [{**rows[0], "rank": 1, "share": 0.4}, {**rows[0], "device": "NVIDIA H200"}]
    key = ("device", "shape", "rank")
    table.replace(path, [*rows, *others], key)
    on_cpu, on_gpu = ops.digest(table.read(path))
    assert on_cpu.startswith("cpu, float32: ops against the roofline (9 GFLOP/s, 2 GB/s")
    assert "80% in the median of 4; conv_grad_sample 50% to 110% (cpu)." in on_cpu
    assert on_gpu.startswith("NVIDIA H200, float32: ")
    layers = ops.tables(table.read(path))[1]
    assert layers.endswith("| d | – | 1.1 ms, 110% | – | – |")
    table.replace(path, [{**row, "batch_ms": 1} for row in rows], key)
    assert "1.10 times its time in the geometric mean of 4" in ops.digest(table.read(path))[0]
    layers = ops.tables(table.read(path))[1]
    assert "| a | – | 1.1 ms, 50% | – | 1.10 |" in layers


def test_every_op_of_the_cpu_runs() -> None:
    for (op, shape), make in calls.cases("cpu").items():
        if "48^3" not in shape and "32^2" not in shape:
            call = make(calls.Place(torch.device("cpu")))
            found = call()
            tensors = [found] if isinstance(found, torch.Tensor) else found
            assert all(t.isfinite().all() for t in tensors), (op, shape)
            assert call.bytes > 0


def test_the_library_beside_an_op_forms_the_same_gradients() -> None:
    for layer in (Linear(3, 4, 5, 6), Conv(3, 4, 6, 5, stride=2), Conv(2, 4, 4, 6, groups=4)):
        op = main.ops.ops.linear_grad_sample
        if isinstance(layer, Conv):
            op = main.ops.ops.conv_grad_sample
        call = calls._of_layer(op, layer, calls.Place(torch.device("cpu")))
        each = call()
        torch.testing.assert_close(each.sum(0), call.beside["batch"](), rtol=1e-4, atol=1e-4)
        for name in {"grouped", "looped"} & call.beside.keys():
            torch.testing.assert_close(call.beside[name](), each, rtol=1e-4, atol=1e-4)


def test_points_of_a_curve_are_measured_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scaling.csv"
    monkeypatch.setattr(scaling, "PLAN", _PLAN)
    todo = scaling.todo(How(path), ["parameters"], coarse=True)
    assert list(todo.items) == ["parameters=128", "parameters=512", "parameters=2048"]
    first = {"parameters=128": todo.items["parameters=128"]}
    assert scaling.PART.run(replace(todo, items=first)).complete
    rows = results.read(path)
    assert {row.rival for row in rows} == {"ordinary", "ours", "ew", "ghost"}
    assert {row.status for row in rows} == {"ok"}
    assert {scaling.point_of(row) for row in rows} == {("parameters", 128)}
    picture = pictures.scaling(rows, tmp_path)
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"curve 'x': expected one of batch"):
        scaling.todo(How(path), ["x"])


def test_every_curve_builds_its_cases() -> None:
    for curve in scaling.CURVES.values():
        assert curve.coarse()[-1] == curve.points[-1]
        assert set(curve.rivals) <= {rival.name for rival in rivals.RIVALS}
        workload = curve.case(curve.points[0]).build(torch.device("cpu"))
        assert workload.parameters() > 0


def test_an_lstm_is_dplstm_for_opacus_and_all_release_the_same() -> None:
    case = next(c for c in cases.CASES if c.name.startswith("lstm"))
    small = replace(case, make_batch=partial(cases._labelled_tokens, 2000, 5, 3))
    chosen = rivals.find(["ours", "hooks", "ghost", "ew"])
    rows = harness.measure(small, chosen, torch.device("cpu"), _PLAN, work.SILENT)
    assert {row.rival: row.status for row in rows} == {rival.name: "ok" for rival in chosen}


def test_the_race_ends_when_both_are_there_and_counts_their_steps(tmp_path: Path) -> None:
    path = tmp_path / "dice.csv"
    task = dice.Task(
        patients=6, held_out=1, side=16, batch_size=4, steps=3, every=1, dice=0.0, delta=1e-2
    )
    assert dice.PART.run(dice.of_task(task, 1, How(path))).complete
    rows = table.read(path)
    assert [row["rival"] for row in rows] == ["ours", "Opacus"]
    assert {(row["steps"], row["reached"]) for row in rows} == {("1", "True")}
    assert all(float(row["processor_seconds"]) > 0 for row in rows)
    (line,) = dice.digest(table.read(path))
    assert "(1 of 1 runs)" in line
    unreached = dice.of_task(replace(task, dice=1.1, steps=1), 1, How(path))
    assert dice.PART.run(unreached).complete
    assert {(row["seconds"], row["reached"]) for row in table.read(path)} == {("", "False")}
    assert "never got there" in dice.digest(table.read(path))[0]


def test_dice_of_the_truth_is_one() -> None:
    labels = torch.zeros(2, 1, 4, 4, 4)
    labels[:, :, :2] = LIVER

    class Known(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(image[:, 0].long(), 3).movedim(-1, 1).float()

    runner = dice.Runner(Known(), lambda batch: None, dice.WeightAverage(Known(), 0.0))
    assert dice.liver_dice(runner, labels, labels) == 1.0
    assert dice.liver_dice(runner, labels.flip(2), labels) == 0.0


def test_an_accountant_is_asked_in_a_process_of_its_own_with_a_limit() -> None:
    answer = accounting.ask("tight", 1.0, 0.01, 100, 1.0, limit=60.0)
    assert answer["outcome"] == "ok"
    assert 0.1 < float(str(answer["epsilon"])) < 2.0
    refused = accounting.ask("prv", 1e-7, 0.01, 5000, 1e15, limit=60.0)
    assert refused["epsilon"] is None
    assert refused["outcome"] != "ok"
    slow = accounting.ask("tight", 1.0, 0.01, 100, 1.0, limit=0.0)
    assert slow["outcome"] == "no answer in 0 s"


def test_memory_of_a_process_grows_by_what_it_holds() -> None:
    found = memory.in_fresh_process(_hold, (64 * 10**6,), 60.0)
    assert 60.0 < found < 80.0
    assert memory.in_fresh_process(_die, (), 60.0) is None


def _hold(sender, size: int) -> None:
    growth = memory.Growth()
    held = torch.ones(size, dtype=torch.uint8)
    sender.send(growth.peak_mb() if len(held) else None)


def _die(sender) -> None:
    raise SystemExit(1)


def test_a_row_above_target_or_behind_a_rival_is_named_with_its_reason() -> None:
    goals = {"encoder-t128-d256-b8": targets.Target(1.1, 1.2, "", ("why",))}
    assert targets.missed([_row("ours", 1.05), _row("ew", 1.04)], goals) == {}
    missed = targets.missed([_row("ours", 1.2)], goals)
    assert {case: str(miss) for case, miss in missed.items()} == {
        "encoder-t128-d256-b8": "time 1.200, target 1.10: why"
    }
    (behind,) = targets.missed([_row("ours", 1.05), _row("ew", 0.9)], {}).values()
    assert str(behind) == f"Opacus ew is faster, 0.90: {targets.NO_REASON}"


def test_a_shared_reason_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    goals = {
        name: targets.Target(1.0, 1.0, "", ("stored", "its own"))
        for name in ("encoder-t128-d256-b8", "vit-32-b32")
    }
    monkeypatch.setattr(targets, "read", lambda: goals)
    monkeypatch.setattr(targets, "reasons", lambda: {"stored": "read again", "unused": "no"})
    (text,) = report.tables([_row("ours", 1.2, case) for case in goals])
    assert text.count("target 1.00: stored; its own") == 2
    assert text.count("*stored*: read again") == 1
    assert "its own*" not in text
    assert "unused" not in text


def test_every_shared_reason_is_used() -> None:
    stated = {reason for target in targets.read().values() for reason in target.reasons}
    assert set(targets.reasons()) <= stated


def test_the_summary_counts_cases_that_are_first_level_and_behind() -> None:
    names = [case.name for case in cases.find([], "cpu")][:3]
    rows = [_row("ours", 1.0, name) for name in names]
    rows += [_row("loop", ratio, name) for name, ratio in zip(names, (2.0, 0.99, 0.5), strict=True)]
    (text,) = report.tables(rows)
    assert "fastest DP step in 1 of 3 cases, level (within 3%) in: " in text
    assert "(per-sample loop 0.99 for 1.00); slower in: " in text


def test_strategies_are_told_by_shape_with_what_the_planner_took(tmp_path: Path) -> None:
    path = tmp_path / "regret.csv"
    candidates = "store, auto 3 ms; gram, auto 2 ms; gram, library 1.5 ms"
    shapes = {
        "linear B=8 T=16 64->64": ("gram, auto", candidates),
        "linear B=8 T=16 64->256": ("store, auto", candidates),
        "conv B=2 1->24 48^3 k=3 s=1": ("store, auto", "store, auto 2 ms; store, tiles 1 ms"),
    }
    rows = [{"shape": s, "chosen": c, "candidates": each} for s, (c, each) in shapes.items()]
    table.replace(path, rows, ("shape",))
    head, linear, conv = regret.strategies(table.read(path))
    assert head.startswith("Where each strategy takes over")
    assert "| linear | 64->64 | 64->256 |" in linear
    assert "| B=8 T=16 | gram (store 2.00) | **gram (store 2.00), taken: store** |" in linear
    assert conv.endswith("| B=2 1->24 48^3 k=3 s=1 | store |")


def test_rows_of_several_commits_are_told_by_how_many() -> None:
    rows = [{"date": "2026-01-01", "commit": c} for c in ("b", "a", "b")]
    assert table.provenance(rows[:1]) == "2026-01-01, commit b"
    assert table.provenance(rows) == "2026-01-01, commit b (2 of 3 rows; the others: a)"
    assert table.provenance([]) == ""


def test_every_case_but_the_quick_ones_has_a_line_of_targets() -> None:
    wanted = {case.name for suite in ("cpu", "gpu") for case in cases.find([], suite)}
    assert set(targets.read()) == wanted
