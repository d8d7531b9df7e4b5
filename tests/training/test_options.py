"""What the command lines of all trainers share."""

import warnings

import pytest
import typer
from rich.console import Console

from dpkernels.training import options
from dpkernels.training.run_folder import RunFolder
from dpkernels.training.trainer import TrainingResult
from tests.training.toy import ToyConfig, ToyTrainer


def test_warnings_of_a_command_are_one_line_without_a_path(capsys):
    with options.terminal(console=Console(width=40)):
        warnings.warn("one [line], however long it may be", stacklevel=1)
    assert capsys.readouterr().out == "Warning: one [line], however long it may be\n"


@pytest.mark.parametrize("error", [ValueError, OSError, FloatingPointError])
def test_a_fault_is_one_line_and_exit_code_2(capsys, error):
    with (
        pytest.raises(typer.Exit) as ended,
        options.terminal(console=Console(width=40, quiet=True)),
    ):
        raise error("data.root: [no] such folder, however long the line may be")
    assert ended.value.exit_code == 2
    assert capsys.readouterr().out == (
        "Error: data.root: [no] such folder, however long the line may be\n"
    )


def test_ctrl_c_says_how_to_go_on(capsys):
    with pytest.raises(typer.Exit) as ended, options.terminal(options.AGAIN, Console()):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    assert capsys.readouterr().out == f"Stopped. {options.AGAIN}\n"


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), options.terminal(console=Console()):
        raise ZeroDivisionError


def test_warnings_are_shown_as_before_after_the_block():
    before = warnings.showwarning
    with options.terminal(console=Console()):
        assert warnings.showwarning is not before
    assert warnings.showwarning is before


@pytest.fixture
def configured(tmp_path):
    """`configured(*overrides, **options)`: what the command line makes of them."""

    def make(*overrides, config=None, out=None, resume=False, **given):
        asked = {"epsilon": None, "delta": None, "noise_multiplier": None, "non_private": False}
        file = None
        if config is not None:
            file = tmp_path / "change.yaml"
            file.write_text(config)
        return options.configuration(
            ToyConfig, preset="toy", out=out, resume=resume, config=file,
            changes=options.privacy_changes(**{**asked, **given}), overrides=list(overrides),
        )  # fmt: skip

    return make


def test_options_win_over_the_file_and_overrides_over_both(configured):
    file = "privacy: {epsilon: 1.0, delta: 1.0e-7}\ntraining: {steps: 7, batch_size: 3}"
    config = configured("training.steps=9", config=file, epsilon=2.0)
    assert (config.privacy.epsilon, config.privacy.delta) == (2.0, 1e-7)
    assert (config.training.steps, config.training.batch_size) == (9, 3)
    assert configured("privacy.epsilon=4", config=file, epsilon=2.0).privacy.epsilon == 4.0


def test_a_noise_multiplier_takes_the_place_of_the_budget_and_back(configured):
    noise = configured(noise_multiplier=1.5).privacy
    assert (noise.epsilon, noise.noise_multiplier) == (None, 1.5)
    file = "privacy: {epsilon: null, noise_multiplier: 1.5}"
    budget = configured(config=file, epsilon=3.0).privacy
    assert (budget.epsilon, budget.noise_multiplier) == (3.0, None)
    assert not configured(non_private=True).privacy.enabled


@pytest.mark.parametrize(
    "given",
    [
        {"epsilon": 1.0, "noise_multiplier": 1.0},
        {"epsilon": 1.0, "non_private": True},
        {"noise_multiplier": 1.0, "non_private": True},
    ],
)
def test_what_contradicts_is_refused(configured, given):
    first, second = (f"--{name.replace('_', '-')}" for name in given)
    with pytest.raises(ValueError, match=f"{first} and {second} exclude each other"):
        configured(**given)


def test_a_resumed_run_starts_from_its_own_configuration(configured, finished):
    config = configured("training.physical_batch_size=1", resume=True, out=finished)
    assert (config.training.steps, config.training.ema_decay) == (3, 0.9)
    assert config.training.physical_batch_size == 1
    with pytest.raises(ValueError, match="--resume needs --out"):
        configured(resume=True)
    with pytest.raises(ValueError, match="is not a run folder"):
        configured(resume=True, out=finished / "checkpoints")


def test_the_report_of_a_read_only_run_is_printed_all_the_same(finished, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(30, "Read-only file system", "privacy_report.json")

    monkeypatch.setattr(RunFolder, "write_json", refuse)
    console = Console(width=200)
    with options.terminal(console=console):
        options.print_report(console, ToyTrainer.from_run(finished))
    shown = capsys.readouterr().out
    assert "The unit is the patient" in shown
    assert "Not saved: [Errno 30] Read-only file system: 'privacy_report.json'" in shown


@pytest.mark.parametrize(
    ("epsilon", "words"), [(7.98765, "epsilon 7.988 per lesion, 5 steps."), (None, "No privacy gu")]
)
def test_the_outcome_names_the_budget_and_the_files(tmp_path, capsys, epsilon, words):
    result = TrainingResult(tmp_path, {}, 0.5, "Dice", epsilon, 5)
    options.print_outcome(Console(width=200), result, "lesion", {"overlays/": "what it found"})
    shown = capsys.readouterr().out
    assert words in shown
    for name in ("privacy_report.md", "progress.png", "overlays/", "checkpoints/"):
        assert str(tmp_path / name) in shown
    assert "what it found" in shown
