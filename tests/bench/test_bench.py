"""The bench's own promises: wrong gradients are not timed, reruns replace rows, tables add up."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import (
    cases,
    gate,
    harness,
    models,
    pictures,
    report,
    results,
    rivals,
    table,
    timing,
    work,
)
from bench.__main__ import app
from tests.bench.support import TINY, write

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
_CPU = torch.device("cpu")
_PLAN = harness.Plan(seconds=0.0, least=2, most=2, memory=False)


def _row(case: str = "unet3d-48-b2", rival: str = "ours", **values: object) -> results.Row:
    fields = {"status": "ok", "batch": 2, "parameters": 3, "precision": "float32"}
    place = {"device": "cpu", "threads": 1, "config": "as it is", "version": "1"}
    return results.Row(case, rival, **{**fields, **place, **values})


def _measure(*chosen: rivals.Rival, precision: str = "float32") -> dict[str, results.Row]:
    case = replace(TINY, precision=precision)
    found = harness.measure(case, list(chosen), _CPU, _PLAN, work.SILENT)
    return {row.rival: row for row in found}


def _scaled(workload: cases.Workload, privacy: rivals.Privacy) -> rivals.Trainer:
    """The per-sample loop, but its gradient one per cent too large."""
    honest = next(r for r in rivals.RIVALS if r.name == "loop").prepare(workload, privacy)

    def step() -> None:
        honest.step()
        for parameter in honest.parameters.values():
            parameter.grad.mul_(1.01)

    return rivals.Trainer(step, honest.clear, honest.parameters)


def _broken(workload: cases.Workload, privacy: rivals.Privacy) -> rivals.Trainer:
    raise NotImplementedError("no rule for this layer")


def test_every_rival_passes_the_gate_and_is_timed() -> None:
    rows = _measure(*(rival for rival in rivals.RIVALS if rival.version()))
    assert {name: row.status for name, row in rows.items()} == dict.fromkeys(rows, "ok")
    assert all(row.ms > 0 and row.rounds >= 2 for row in rows.values())
    assert rows["ordinary"].ratio == 1.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_wrong_gradient_is_never_timed(precision: str) -> None:
    ordinary, ours = rivals.find(["ours"])
    wrong = rivals.Rival("wrong", "wrong", "", "torch", _scaled)
    broken = rivals.Rival("broken", "broken", "", "torch", _broken)
    rows = _measure(ordinary, ours, wrong, broken, precision=precision)
    assert rows["ours"].status == "ok"
    assert rows["wrong"].status.startswith("wrong gradient: error 0.01")
    assert rows["broken"].status == "cannot run: no rule for this layer"
    assert rows["wrong"].ms is None
    assert rows["broken"].ms is None


def test_the_noise_is_on_while_timing() -> None:
    workload = TINY.build(_CPU)
    truth = gate.ground_truth(workload)
    for rival in rivals.find(["ours", "loop", "hooks", "ghost"])[1:]:
        privacy = rivals.Privacy(truth.max_grad_norm, 0.0)
        trainer = rival.prepare(workload, privacy)
        assert truth.error(gate.released(trainer)) <= truth.allowed
        privacy.noise_multiplier = 1.0
        assert truth.error(gate.released(trainer)) > 0.1, rival.name


def test_the_margin_is_what_the_engine_leaves_below_the_bound() -> None:
    workload = TINY.build(_CPU)
    bound = gate.ground_truth(workload).max_grad_norm
    ours, loop = (
        rivals.find([name])[1].prepare(workload, rivals.Privacy(bound, 0.0))
        for name in ("ours", "loop")
    )
    ours.step()
    loop.step()
    assert 0.0 < ours.margin() < 1e-3
    assert loop.margin() == 0.0


def test_some_samples_are_clipped_and_some_are_not() -> None:
    workload = TINY.build(_CPU)
    bound = gate.ground_truth(workload).max_grad_norm
    loop = rivals.find(["loop"])[1]
    clipped, free = (
        gate.released(loop.prepare(workload, rivals.Privacy(c, 0.0))) for c in (bound, 1e6)
    )
    assert gate.Truth(free, bound, 0.0).error(clipped) > 1e-3


def test_cases_have_names_of_their_own_and_a_suite() -> None:
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)
    assert {case.suite for case in cases.CASES} == {"cpu", "quick", "gpu"}


def test_the_u_net_has_the_stated_size() -> None:
    parameters = sum(p.numel() for p in models.UNet3d().parameters())
    assert round(parameters / 1e6, 2) == 0.76


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"case 'x': expected one of .*unet3d-48-b2"):
        cases.find(["x"], "cpu")
    with pytest.raises(ValueError, match=r"rival 'x': expected one of ordinary, ours"):
        rivals.find(["x"])
    assert CliRunner().invoke(app, ["--case", "x"]).exit_code == 2


def _rounds(
    times: dict[str, float | Exception], most: int
) -> tuple[dict[str, timing.Samples], list[str]]:
    """What `interleave` makes of rivals whose steps take these times, and whose turn it was."""
    order: list[str] = []

    def clock(step) -> timing.Times:
        return timing.Times(step())

    def step(name: str) -> float:
        order.append(name)
        taken = times[name]
        if isinstance(taken, Exception):
            raise taken
        return taken

    steps = {name: partial(step, name) for name in times}
    rounds = timing.interleave(steps, clock, seconds=9.0, least=3, most=most)
    return list(rounds)[-1], order


def test_rounds_are_interleaved_and_slow_ones_stop_early() -> None:
    times = {"ordinary": 1.0, "close": 1.5, "slow": 9.0}
    samples, order = _rounds(times, 5)
    assert {name: len(s.wall) for name, s in samples.items()} == {
        "ordinary": 5,
        "close": 5,
        "slow": 2,
    }
    timed = order[-12:]
    assert timed[:3] != timed[3:6]
    assert sorted(timed[:3]) == sorted(timed[3:6]) == sorted(times)
    assert timing.ratios(samples["slow"].wall, samples["ordinary"].wall) == [9.0, 9.0]


def test_ours_is_never_dropped_however_slow() -> None:
    samples, _ = _rounds({"ordinary": 1.0, "ours": 9.0, "loop": 9.0}, 5)
    assert {name: len(s.wall) for name, s in samples.items()} == {
        "ordinary": 5,
        "ours": 5,
        "loop": 2,
    }


def test_a_rival_whose_step_fails_drops_out_and_the_base_does_not() -> None:
    samples, order = _rounds({"ordinary": 1.0, "hooks": RuntimeError("no memory")}, 4)
    assert len(samples["ordinary"].wall) == 4
    assert samples["hooks"].wall == {}
    assert str(samples["hooks"].error) == "no memory"
    assert order.count("hooks") == 1
    with pytest.raises(RuntimeError, match="nothing to compare with"):
        _rounds({"ordinary": RuntimeError("nothing to compare with"), "ours": 1.0}, 4)


def test_a_step_that_fails_while_timed_is_the_status_of_its_row() -> None:
    def prepare(workload: cases.Workload, privacy: rivals.Privacy) -> rivals.Trainer:
        honest = next(r for r in rivals.RIVALS if r.name == "loop").prepare(workload, privacy)

        def step() -> None:
            if privacy.noise_multiplier:
                raise RuntimeError("no memory for the noise")
            honest.step()

        return rivals.Trainer(step, honest.clear, honest.parameters)

    failing = rivals.Rival("failing", "failing", "", "torch", prepare)
    rows = _measure(*rivals.find(["ours"]), failing)
    assert rows["failing"].status == "cannot run: no memory for the noise"
    assert rows["failing"].ms is None
    assert rows["ours"].ratio is not None


def test_the_seconds_of_a_case_end_what_follows_but_not_ours() -> None:
    plan = replace(_PLAN, case_seconds=0.0001)
    chosen = rivals.find(["ours", "loop", "ghost"])
    found = harness.measure(TINY, chosen, _CPU, plan, work.SILENT)
    rows = {row.rival: row for row in found}
    late = "not timed: the 0 s for this case were over"
    assert [rows[r].status for r in ("ordinary", "ours", "loop", "ghost")] == [
        "ok",
        "ok",
        late,
        late,
    ]
    assert rows["ours"].ratio is not None
    assert rows["loop"].gate_error is None


def test_the_loop_in_float32_is_the_truth_of_both_precisions_and_runs_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    precisions: list[str] = []
    honest = gate._sums

    def counted(workload: cases.Workload, bound: float) -> gate.Sums:
        precisions.append(workload.case.precision)
        return honest(workload, bound)

    monkeypatch.setattr(gate, "_sums", counted)
    workload = replace(TINY, precision="bfloat16").build(_CPU)
    (_, in_float), (_, in_bfloat) = gate.truths(workload)
    assert precisions == ["float32", "bfloat16"]
    assert in_float.gradients is in_bfloat.gradients
    assert in_float.allowed < 1e-3 < in_bfloat.allowed


def test_a_rerun_replaces_its_own_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write(path, [_row(ratio=2.0), _row(rival="loop", ratio=3.0), _row(threads=2)])
    write(path, [_row(ratio=1.25, status='a "quoted", status')])
    rows = results.read(path)
    assert len(rows) == 3
    assert rows[0] == _row(ratio=1.25, status='a "quoted", status')
    assert rows[1].ratio == 3.0
    assert rows[1].memory_mb is None


def test_a_comma_without_quotes_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("case,reason\na,b, c\n")
    with pytest.raises(ValueError, match=r"row 2: expected 2 cells"):
        table.read(path)


def test_text_goes_between_the_markers_of_a_file(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("above\n")
    with pytest.raises(ValueError, match=r"README.md: expected a line <!-- bench:begin -->"):
        report.write(readme, "new")
    readme.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    report.write(readme, "new")
    assert readme.read_text() == f"above\n{report.BEGIN}\nnew\n{report.END}\nbelow\n"


def test_the_table_shows_ours_and_marks_what_is_above_target() -> None:
    rows = [_row(rival="ordinary", ms=12.3), _row(ratio=1.04, memory_ratio=1.1)]
    (text,) = report.tables(rows)
    assert "| 12 ms | **1.04 / 1.10** | – |" in text
    assert "above target" not in text
    (text,) = report.tables([*rows[:1], _row(ratio=1.2, memory_ratio=1.1)])
    assert "| **1.20 / 1.10**\\* |" in text
    assert "- 3D U-Net 0.76 M, 48³, B=2: time 1.200, target 1.05: no reason stated." in text


def test_rows_of_a_gpu_are_a_table_of_their_own() -> None:
    rows = [_row(ratio=1.04), _row(case="unet3d-96-b2", device="NVIDIA H200", ratio=1.02)]
    on_cpu, on_gpu = report.tables(rows)
    assert "1.04" in on_cpu
    assert "NVIDIA H200" in on_gpu
    assert "1.02" in on_gpu


def test_pictures_are_drawn(tmp_path: Path) -> None:
    rows = [_row(rival="ordinary", ratio=1.0), _row(ratio=1.04, memory_ratio=1.1)]
    picture = pictures.steps(rows, tmp_path, "one thread")
    assert picture.read_bytes().startswith(b"\x89PNG")
