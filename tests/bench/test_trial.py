"""The bench of the trial for mixed samples: what it switches, what it computes, what it tells."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import __main__ as main
from bench import cases, harness, models, rivals, table, timing, work
from bench.part import How
from bench.parts import trial
from tests.bench.support import TINY

pytestmark = pytest.mark.filterwarnings("ignore")
_PLAN = harness.Plan(seconds=0.0, least=2, most=2, memory=False)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a test is remembered for a measurement, nor the other way round."""
    monkeypatch.setattr(work, "STATE", tmp_path / "state")


class _Counting(models.Recommender):
    """Counts forward passes of all networks of the class: a trial gives instances back their own.

    Attributes:
        passes: forward passes so far.
    """

    passes = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        _Counting.passes += 1
        return super().forward(ids)


@pytest.mark.parametrize(("which", "with_trial"), [("doubling", {1, 2, 4, 8}), ("off", set())])
def test_the_trial_runs_at_powers_of_two_or_never(which: str, with_trial: set[int]) -> None:
    make_model = partial(_Counting, 32, 2, 4, (8,))
    workload = replace(TINY, make_model=make_model).build(timing.CPU)
    train = trial.private(workload, rivals.Privacy(1.0, 0.0), which)
    passes = {}
    for step in range(1, 10):
        before = _Counting.passes
        train()
        passes[step] = _Counting.passes - before
    assert {step for step, count in passes.items() if count > 1} == with_trial
    if with_trial:
        assert passes[1] > passes[2] == passes[4] == passes[8]


def test_a_trial_changes_no_gradient() -> None:
    workload = TINY.build(timing.CPU)
    found = []
    for which in (trial.DEFAULT, trial.OFF):
        train = trial.private(workload, rivals.Privacy(1.0, 0.0), which)
        train.step()
        found.append({name: p.grad for name, p in train.parameters.items()})
    torch.testing.assert_close(*found)


def test_figures_are_differences_of_steps_in_ordinary_ones() -> None:
    private = {
        trial.DEFAULT: [[1.0, 0.5], [1.2, 0.7], [9.0, 9.0]],
        trial.OFF: [[0.2, 0.3], [0.2, 0.3], [0.2, 0.3]],
    }
    found = trial.Seconds([0.1, 0.1, 0.4], private).figures()
    assert found["ordinary_ms"] == pytest.approx(100.0)
    assert found["first"] == pytest.approx(10.0)
    assert found["later"] == pytest.approx(4.0)
    assert found["first_p20"] == pytest.approx(8.8)
    assert found["later_p80"] == pytest.approx(53.8)


def test_a_run_of_a_thousand_steps_has_ten_trials() -> None:
    assert [trial.trials(steps) for steps in (1, 2, 3, 4, 1000, 1024)] == [1, 2, 2, 3, 10, 11]
    assert trial.run_percent(first=8.0, later=2.0) == pytest.approx(2.6)


def test_a_case_is_measured_written_and_told(tmp_path: Path) -> None:
    path = tmp_path / "trial.csv"
    todo = trial.of_cases([TINY], How(path), _PLAN)
    assert trial.PART.run(todo).complete
    (row,) = table.read(path)
    assert (row["case"], row["batch"], row["trials"], row["rounds"]) == ("tiny", "6", "10", "2")
    assert float(row["ordinary_ms"]) > 0
    assert row["device"] == "cpu"
    trial.PART.show(todo)


def test_memory_is_that_of_a_first_step_with_the_trial_over_one_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, int]] = []
    grown = {"ours, trial doubling": iter((3.0, 99.0, 4.0)), "ours, trial off": iter((2.0,) * 3)}

    def on_cpu(case, rival, privacy, threads, steps):
        asked.append((rival.name, steps))
        return next(grown[rival.name])

    monkeypatch.setattr(trial.memory, "on_cpu", on_cpu)
    assert trial._memory(TINY, 1, 3) == {"memory_mb": 4.0, "memory_off_mb": 2.0, "memory": 2.0}
    assert asked == [(name, 1) for name in grown for _ in range(3)]
    monkeypatch.setattr(trial.memory, "on_cpu", lambda *_, **__: None)
    assert trial._memory(TINY, 1, 3)["memory"] is None


def test_memory_is_measured_in_a_fresh_process() -> None:
    wide = replace(TINY, make_model=partial(models.Recommender, 32, 2, 4, (4096, 512)))
    found = trial._grown(wide, trial.OFF, threads=1, processes=1)
    assert found is None or found > 4 * 4096 * 512 / 1e6


def _rows(tmp_path: Path) -> list[dict[str, str]]:
    same = {"batch": 64, "ordinary_ms": 2.0, "first": 4.0, "later": 2.0, "run_1000": 2.2}
    first = {"case": "perceptron-b64", **same, "memory": 1.04}
    others = [
        {**first, "case": "perceptron-b32768", "batch": 32_768, "first": 9.0, "run_1000": 3.1},
        {**first, "case": "vit-32-b32", "memory": None},
    ]
    path = tmp_path / "rows.csv"
    table.replace(path, [first, *others], ("case",))
    return table.read(path)


def test_what_is_above_its_goal_is_marked(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    small, large, vit = trial.lines(rows)
    assert small == ("MLP, 128-256-256-10, B=64", "64", "2 ms", "4.0", "2.0", "2.20%", "1.040")
    assert large[1:] == ("32,768", "2 ms", "9.0*", "2.0", "3.10%*", "1.040")
    assert vit[-1] == "–"
    head, shown = trial.tables(rows)
    assert "In bold: above the goal" in head
    assert "(goal: at most 8)" in shown
    assert "| **9.0** | 2.0 | **3.10%** | 1.040 |" in shown


def test_the_worst_case_and_the_batch_sizes_are_told(tmp_path: Path) -> None:
    cost, batches = trial.digest(_rows(tmp_path))
    assert "at most 9 (perceptron-b32768; goal 8, met in 2 of 3)" in cost
    assert "at most 3.1% (perceptron-b32768; goal 3%, met in 2 of 3)" in cost
    assert "goal 1.05, met in 2 of 2" in cost
    assert batches.endswith("4.0 at B=64, 9.0 at B=32,768.")


def test_cases_are_those_of_steps_and_an_mlp_at_three_batch_sizes(tmp_path: Path) -> None:
    how = How(tmp_path / "trial.csv")
    names = list(trial.todo(how).items)
    assert set(trial.OF_STEPS) <= {case.name for case in cases.find([], "cpu")} & set(names)
    assert [case.build(timing.CPU).batch_size for case in trial.BATCHES] == [64, 1024, 32_768]
    assert list(trial.todo(how, ["vit-32-b32"]).items) == ["vit-32-b32"]
    with pytest.raises(ValueError, match=r"case 'x': expected one of unet3d-48-b2"):
        trial.todo(how, ["x"])


def test_gpt2_has_a_step(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="GPT-2 is Hugging Face's")
    make = partial(models.GPT2, 32, 6, 8, 1, 2)
    small = replace(TINY, make_model=make, make_batch=partial(cases.tokens, 32, 6, 3))
    workload = small.build(timing.CPU)
    assert workload.model(workload.inputs).shape == (3, 32, 6)
    trial.private(workload, rivals.Privacy(1.0, 1.0), trial.DEFAULT)()


def test_the_command_prints_what_the_rows_say(tmp_path: Path) -> None:
    _rows(tmp_path)
    arguments = ["trial", "--show", "--output", str(tmp_path / "rows.csv")]
    result = CliRunner().invoke(main.app, arguments)
    assert result.exit_code == 0, result.output
