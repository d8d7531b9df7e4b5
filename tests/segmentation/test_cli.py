import json

import pytest
from typer.testing import CliRunner

from dpkernels.segmentation.cli import app

TINY = [
    "--set=data.shape=[16,16,16]",
    "--set=data.test_share=0.25",
    "--set=network.channels=[4,8]",
    "--set=network.strides=[2]",
    "--set=training.batch_size=2",
    "--set=evaluation.overlays=1",
    "--device=cpu",
    "--steps=2",
]


@pytest.fixture
def run():
    def invoke(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})

    return invoke


def test_help_names_the_commands_and_where_to_start(run):
    text = run("--help").output
    for word in ("train", "evaluate", "predict", "report", "phantom", "per patient", "Decathlon"):
        assert word in text
    for option in (
        "--data",
        "--epsilon",
        "--preset",
        "--resume",
        "--set",
        "--non-private",
        "--out",
    ):
        assert option in run("train", "--help").output


def test_from_phantom_to_report_and_predictions(run, tmp_path):
    data, out = tmp_path / "Task99_Phantom", tmp_path / "run"
    assert run("phantom", data, "--patients", 6, "--size", 20).exit_code == 0
    trained = run("train", "--data", data, "--epsilon", 20, "--out", out, *TINY)
    assert trained.exit_code == 0, trained.output
    assert "epsilon 20 per patient, 2 steps" in trained.output
    assert "liver" in trained.output
    assert json.loads((out / "privacy_report.json").read_text())["planned_steps"] == 2
    evaluated = run("evaluate", out)
    assert evaluated.exit_code == 0
    assert "liver" in evaluated.output
    predicted = run("predict", out, data / "imagesTr", tmp_path / "predictions")
    assert predicted.exit_code == 0
    assert len(list((tmp_path / "predictions").glob("*.nii.gz"))) == 6
    assert "The unit is the patient" in run("report", out).output
    again = run("train", "--data", data, "--out", out, *TINY)
    assert again.exit_code == 2
    assert "holds a run that took steps" in again.output
    finished = run("train", "--resume", "--out", out)
    assert finished.exit_code == 2
    assert "all 2 planned steps" in finished.output


def test_without_privacy_the_report_says_so(run, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    run("phantom", data, "--patients", 6, "--size", 20)
    result = run("train", "--data", data, "--non-private", "--out", out, *TINY)
    assert result.exit_code == 0, result.output
    assert "No privacy guarantee" in result.output
    assert "no privacy guarantee" in (out / "privacy_report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epsilon", "8", "--non-private"], "--epsilon and --non-private exclude each other"),
        (["--epsilon", "8", "--noise-multiplier", "1"], "exclude each other"),
        (["--preset", "msd"], "--preset must be one of phantom, "),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", "nowhere"], "is not a run folder"),
        (["--set", "training.stepz=3"], "unknown setting training.stepz; did you mean steps?"),
        (["--data", "nowhere"], "is not a folder"),
        (["--config", "nowhere.yaml"], "no such file"),
    ],
)
def test_faults_end_in_one_line_and_exit_code_2(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("train", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
