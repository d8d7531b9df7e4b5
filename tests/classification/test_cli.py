import json

import pytest
from typer.testing import CliRunner

from dpkernels.classification.cli import app

TINY = [
    "--set=data.size=16",
    "--set=data.views_per_patient=2",
    "--set=network.channels=[4,4,4,4]",
    "--set=training.batch_size=6",
    "--delta=1e-3",
    "--device=cpu",
    "--steps=2",
]


@pytest.fixture
def run():
    def invoke(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})

    return invoke


def test_help_names_the_commands_and_the_layouts(run):
    text = run("--help").output
    for word in ("train", "evaluate", "predict", "report", "synthetic", "HAM10000", "RadImageNet"):
        assert word in text
    for option in ("--data", "--epsilon", "--positive", "--patients", "--resume", "--set"):
        assert option in run("train", "--help").output


def test_from_synthetic_images_to_report_and_predictions(run, tmp_path):
    data, out = tmp_path / "images", tmp_path / "run"
    made = run("synthetic", data, "--lesions", 40, "--size", 16, "--layout", "folders")
    assert made.exit_code == 0, made.output
    trained = run("train", "--data", data, "--positive", "", "--out", out, *TINY)
    assert trained.exit_code == 0, trained.output
    assert "Warning: " in trained.output
    assert "taken by itself" in trained.output
    assert "per image, 2 steps" in trained.output
    held_out = len(json.loads((out / "metrics.json").read_text())["cases"])
    assert f"Evaluating held-out images: {held_out} done" in trained.output
    classes = json.loads((out / "data.json").read_text())["classes"]
    assert classes == ["akiec", "bcc", "bkl", "mel", "nv"]
    assert "balanced" in run("evaluate", out).output
    predicted = run("predict", out, data / "mel", tmp_path / "out.csv")
    assert predicted.exit_code == 0, predicted.output
    table = (tmp_path / "out.csv").read_text()
    assert table.startswith("image,class,akiec")
    again = run("predict", out, data / "nv", tmp_path / "out.csv")
    assert again.exit_code == 2
    assert "out.csv exists already" in again.output
    assert (tmp_path / "out.csv").read_text() == table
    assert "The unit is the image" in run("report", out).output


def test_a_study_of_two_budgets_attacks_images_and_writes_its_page(run, tmp_path, lesions):
    settings = [a for a in TINY if not a.startswith("--delta")]
    studied = run(
        "study", "--data", lesions, "--epsilons", "8,1e12", "--attacks", "optimal",
        "--attacked", 2, "--set=privacy.delta=1e-3", "--out", tmp_path / "study", *settings,
    )  # fmt: skip
    assert studied.exit_code == 0, studied.output
    page = (tmp_path / "study" / "report.html").read_text()
    assert "MCC" in page
    assert "lesion" in page
    assert len((tmp_path / "study" / "table.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "isic"], "--preset must be one of synthetic, ham10000, radimagenet"),
        (["--data", "nowhere"], "is not a folder"),
        (["--resume"], "--resume needs --out"),
    ],
)
def test_faults_end_in_one_line_and_exit_code_2(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("train", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
