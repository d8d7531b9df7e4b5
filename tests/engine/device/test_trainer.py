"""The demonstration of ``dpkernels segment train`` on a device, a few steps of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from dpkernels.cli import app

pytest.importorskip("monai", reason="the demonstration's network and loss are MONAI's")
pytest.importorskip("nibabel", reason="the demonstration's scans are NIfTI files")

TINY = [
    "--set=data.shape=[16,16,16]",
    "--set=data.test_share=0.25",
    "--set=network.channels=[4,8]",
    "--set=network.strides=[2]",
    "--set=training.batch_size=2",
    "--set=evaluation.overlays=1",
    "--steps=3",
]


def segment(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["segment", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.gpu)])
def test_demonstration(precision: str, device: torch.device, tmp_path: Path) -> None:
    data, out = tmp_path / "Task99_Phantom", tmp_path / "run"
    segment("phantom", data, "--patients", 6, "--size", 20)
    settings = [*TINY, f"--device={device.type}", f"--set=training.precision={precision}"]
    segment("train", "--data", data, "--epsilon", 20, "--out", out, *settings)
    assert json.loads((out / "env.json").read_text())["device"] == device.type
    report = json.loads((out / "privacy_report.json").read_text())
    assert report["planned_steps"] == 3
    assert "liver" in segment("evaluate", out).output
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0.0 <= metrics["summary"]["liver"]["dice"] <= 1.0
