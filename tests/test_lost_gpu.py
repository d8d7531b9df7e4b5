"""The plugin that ends a process without a usable GPU, with a device that only pretends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lost_gpu import EXIT_CODE

ROOT = Path(__file__).resolve().parent.parent

DEVICE = """
import torch

broken = False


def synchronize():
    if broken:
        raise RuntimeError("an illegal memory access was encountered")


torch.cuda.is_available = lambda: True
torch.cuda.synchronize = synchronize
"""

TESTS = """
import pretended_device
import pytest


@pytest.mark.gpu
def test_before():
    pass


@pytest.mark.gpu
def test_offender():
    pretended_device.broken = True


@pytest.mark.gpu
def test_after():
    assert not pretended_device.broken
"""


def run(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """pytest over the three tests above, and the node ids that it recorded."""
    (folder / "pretended_device.py").write_text(DEVICE)
    (folder / "test_device.py").write_text(TESTS)
    record = folder / "lost.txt"
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = os.environ | {"DPKERNELS_LOST_GPU": str(record), "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "tests.lost_gpu", *arguments, "."]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done, record.read_text().splitlines() if record.exists() else []


def test_the_offender_is_named_and_the_process_ends(tmp_path: Path) -> None:
    done, lost = run(tmp_path, "-p", "no:xdist")
    assert done.returncode == EXIT_CODE, done.stdout + done.stderr
    assert lost == ["test_device.py::test_offender"]
    assert "test_offender: the GPU is lost to this process: an illegal" in done.stderr
    assert "test_after" not in done.stdout


def test_a_fresh_worker_runs_the_rest(tmp_path: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    done, lost = run(tmp_path, "-n", "1")
    assert lost == ["test_device.py::test_offender"]
    assert "PASSED test_device.py::test_before" in done.stdout, done.stdout + done.stderr
    assert "PASSED test_device.py::test_after" in done.stdout
    assert "crashed while running 'test_device.py::test_offender'" in done.stdout
    assert done.returncode == 1


def test_a_test_that_needs_no_gpu_is_left_alone(tmp_path: Path) -> None:
    done, lost = run(tmp_path, "-p", "no:xdist", "-k", "test_before")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not lost
