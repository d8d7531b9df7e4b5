"""`dpkernels segment attack | study`, through the trainer, on a cohort of eight."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpkernels.segmentation.cli import app
from dpkernels.segmentation.config import SegmentationConfig
from dpkernels.segmentation.trainer import SegmentationTrainer
from dpkernels.study import progress, runner
from dpkernels.study.runner import Study, StudyReport, StudySettings, attack_folder
from dpkernels.training.run_folder import steps_begun

BUDGETS = (1.0, 1e9, math.inf)
QUICK = {"evaluation": {"surface_distance": False, "overlays": 0}}


def settings(**changes) -> StudySettings:
    return StudySettings(**{"epsilons": BUDGETS, "patients": 3, **changes})


def run_study(config: SegmentationConfig, settings: StudySettings, out: Path) -> StudyReport:
    return Study(SegmentationTrainer, config, settings, out).run()


@pytest.fixture
def no_training(monkeypatch):
    """From now on nothing may train."""

    def refuse(*arguments, **named):
        raise AssertionError("this was done already")

    return lambda: monkeypatch.setattr(SegmentationTrainer, "fit", refuse)


def test_a_study_from_training_to_page(tiny, tmp_path, no_training) -> None:
    report = run_study(tiny(QUICK), settings(), tmp_path / "study")
    assert [row.epsilon for row in report.rows] == list(BUDGETS)
    with (report.folder / "table.csv").open() as file:
        head, *body = csv.reader(file)
    assert (head, body) == (report.head, report.body)
    page = (report.folder / "report.html").read_text()
    markdown = (report.folder / "table.md").read_text()
    for line in body:
        assert "".join(f"<td>{value}</td>" for value in line) in page
        assert f"| {' | '.join(line)} |" in markdown
    assert page.count("data:image/png;base64,") == 2
    assert "src='http" not in page
    for sentence in report.verdict.sentences:
        assert sentence.replace("'", "&#x27;") in page
    optimal = [row.attacks["optimal"] for row in report.rows]
    assert optimal[0].ncc < 0.1 < 0.9 < optimal[1].ncc
    assert optimal[2].ncc == pytest.approx(1)
    assert [row.attacks["imprint"].ncc > 0.9 for row in report.rows] == [False, True, True]
    for row in report.rows:
        plan = json.loads(next(report.folder.glob(f"cells/*{_name(row.epsilon)}-seed0/plan.json"))
                          .read_text())  # fmt: skip
        assert plan["noise_multiplier"] == row.noise_multiplier

    no_training()
    again = run_study(tiny(QUICK), settings(), tmp_path / "study")
    assert again.body == report.body


def _name(epsilon: float) -> str:
    return runner.results.budget(epsilon)


def test_a_budget_means_what_the_accountant_says(tiny, tmp_path) -> None:
    noise = {
        accountant: runner.Study(
            SegmentationTrainer, tiny(), settings(accountant=accountant), tmp_path / accountant
        ).plan()[1e9]
        for accountant in ("rdp", "tight")
    }
    assert noise["rdp"].noise_multiplier > noise["tight"].noise_multiplier
    assert noise["tight"].epsilon(accountant="tight") == pytest.approx(1e9, rel=0.02)
    assert noise["rdp"].epsilon(accountant="rdp") == pytest.approx(1e9, rel=0.02)


def test_stopped_in_a_run_it_goes_on_there(tiny, tmp_path, monkeypatch) -> None:
    """Stopped in the second run's training, then between training and attack."""
    out = tmp_path / "study"
    change = {**QUICK, "training": {"steps": 6, "checkpoint_every": 1}}
    taken = 0
    whole = progress.StudyDisplay.advance

    def stop(self, amount, *, skipped=False):
        nonlocal taken
        taken += amount == 1 and not skipped
        if taken == 10:
            raise KeyboardInterrupt
        whole(self, amount, skipped=skipped)

    with monkeypatch.context() as patched:
        patched.setattr(progress.StudyDisplay, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            run_study(tiny(change), settings(), out)
    first, second = (out / "cells" / f"epsilon-{name}-seed0" for name in ("1", "1e9"))
    assert (first / "study.json").exists()
    assert not (second / "study.json").exists()
    assert steps_begun(second / "checkpoints" / "steps.ledger") == 4
    written = (first / "study.json").stat().st_mtime_ns

    def fail(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner, "attack_run", fail)
        with pytest.raises(KeyboardInterrupt):
            run_study(tiny(change), settings(), out)
    assert steps_begun(second / "checkpoints" / "steps.ledger") == 6
    assert not (second / "study.json").exists()

    report = run_study(tiny(change), settings(), out)
    assert len(report.rows) == 3
    assert (first / "study.json").stat().st_mtime_ns == written
    assert steps_begun(second / "checkpoints" / "steps.ledger") == 6


def test_budgets_and_seeds_can_be_added_other_settings_not(tiny, tmp_path, monkeypatch) -> None:
    out, small = tmp_path / "study", settings(epsilons=(math.inf,), adversaries=("optimal",))
    run_study(tiny(QUICK), small, out)
    trained = []
    fit = SegmentationTrainer.fit
    monkeypatch.setattr(
        SegmentationTrainer,
        "fit",
        lambda self, **named: trained.append(self.folder.root.name) or fit(self, **named),
    )
    more = settings(epsilons=(1e9, math.inf), seeds=2, adversaries=("optimal",))
    report = run_study(tiny(QUICK), more, out)
    assert trained == ["epsilon-1e9-seed0", "epsilon-1e9-seed1", "epsilon-non-private-seed1"]
    assert [row.seeds for row in report.rows] == [2, 2]
    for other, message in (
        ((tiny({**QUICK, "training": {"steps": 4}}), more), "config.training.steps was 3, is 4"),
        ((tiny(QUICK), settings(adversaries=("imprint",))), "adversaries was"),
    ):
        with pytest.raises(ValueError, match=message):
            run_study(*other, out)


@pytest.mark.parametrize(("sigma", "near"), [(1e-6, True), (20.0, False)])
def test_attacking_a_run_uses_its_noise(tiny, tmp_path, monkeypatch, sigma, near) -> None:
    change = {**QUICK, "privacy": {"epsilon": None, "noise_multiplier": sigma}}
    SegmentationTrainer(tiny(change), tmp_path / "run").fit()
    names = ("imprint", "optimal", "optimal-run", "trap-weights")
    shares = []
    whole = progress.StudyDisplay.advance
    monkeypatch.setattr(
        progress.StudyDisplay,
        "advance",
        lambda self, amount, **named: shares.append(amount) or whole(self, amount, **named),
    )
    with pytest.raises(ValueError, match="--patients must be at least 1; got 0"):
        attack_folder(SegmentationTrainer.from_run(tmp_path / "run"), names, 0, None)
    found = attack_folder(SegmentationTrainer.from_run(tmp_path / "run"), names, 3, None)
    assert sum(shares) == pytest.approx(len(names))
    assert len(shares) > len(names)  # the bar moves within an attack, too
    for name in ("imprint", "optimal", "optimal-run"):
        assert (found[name].median("ncc") > 0.95) is near, name
    stored = json.loads((tmp_path / "run" / "attack" / "attack.json").read_text())
    assert stored["noise_multiplier"] == sigma
    assert set(stored["attacks"]) == set(names)
    assert (stored["attacks"]["optimal"]["success"] == 1) is near
    assert (tmp_path / "run" / "attack" / "reconstructions.png").stat().st_size > 5000


@pytest.fixture
def command(cohort, tmp_path):
    def invoke(*arguments):
        options = ["--data", cohort, "--out", tmp_path / "s", "--preset", "phantom", "--steps", 2,
                   "--set=data.shape=[16,16,16]", "--set=training.batch_size=2", "--attacked", 2,
                   "--set=network.channels=[4,8]", "--set=network.strides=[2]",
                   "--set=evaluation.surface_distance=false"]  # fmt: skip
        return CliRunner().invoke(
            app, ["study", *map(str, (*options, *arguments))], env={"COLUMNS": "200"}
        )

    return invoke


def test_the_command_plans_runs_and_concludes(command, tmp_path) -> None:
    planned = command("--epsilons", "8,inf", "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "2 runs of 2 steps" in planned.output
    assert not list(Path(tmp_path).glob("s/cells/*/checkpoints"))
    done = command("--epsilons", "8,inf", "--attacks", "optimal")
    assert done.exit_code == 0, done.output
    assert "Utility: without privacy Dice is" in done.output
    assert "Conclusion (optimal, one update)" in done.output
    run = tmp_path / "s" / "cells" / "epsilon-8-seed0"
    attacked = CliRunner().invoke(app, ["attack", str(run), "--attacks", "optimal"])
    assert attacked.exit_code == 0, attacked.output
    assert "optimal, one update" in attacked.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epsilons", "8,many"), "--epsilons must be numbers or inf, got 'many'"),
        (("--epsilons", "0"), "epsilons must be positive"),
        (("--attacks", "guess"), "adversaries must be some of imprint"),
        (("--accountant", "moments"), "accountant must be one of tight, rdp"),
        (("--seeds", "0"), "seeds must be at least 1"),
    ],
)
def test_faulty_options_are_named(command, arguments, message) -> None:
    refused = command(*arguments)
    assert refused.exit_code == 2
    assert message in refused.output.replace("\n", " ")


def test_help_is_for_strangers() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    assert "attack" in text
    assert "study" in text
    for name, words in (("study", ("--epsilons", "report.html", "--dry-run")),
                        ("attack", ("imprint", "reconstructions.png"))):  # fmt: skip
        output = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        assert all(word in output for word in words)
