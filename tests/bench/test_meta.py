"""What the planner chooses for the GPU cases, on tensors without storage that count as a GPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import cases

_ROOT = Path(__file__).resolve().parents[2]
_UNET = {"store, autograd": 33, "store, cuda": 3, "store, triton": 10}
_LONG = {"gram, triton": 1, "store, autograd": 35, "store, triton": 16}
PLANS = {
    "unet3d-96-b2": _UNET,
    "unet3d-96-b4": _UNET,
    "unet3d-128-b2": _UNET,
    "encoder-t512-d1024-b16": {"gram, triton": 13, "store, autograd": 35, "store, triton": 4},
    "encoder-t1024-d1024-b8": _LONG,
    "encoder-t2048-d1024-b4": _LONG,
    "encoder-t4096-d1024-b2": _LONG,
    "resnet18-224-b32": {
        "channel_gram, triton": 7,
        "gram, triton": 1,
        "store, autograd": 41,
        "store, triton": 13,
    },
    "resnet50-224-b32": {
        "channel_gram, triton": 26,
        "gram, triton": 1,
        "store, autograd": 107,
        "store, triton": 27,
    },
    "recommender-b1024": {"gram, triton": 4, "store, autograd": 3},
}
"""Parameters by strategy and by the backend that runs it first (autograd: biases and scales, formed
by one reduction), at the ridge points of the table."""


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    """By case, in a process that does not interpret Triton."""
    pytest.importorskip("triton", reason="needs triton: it is what the steps launch")
    done = subprocess.run(
        [sys.executable, "-m", "bench.meta", "--json"],
        cwd=_ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_gpu_case_has_a_plan(steps: dict[str, dict[str, Any]]) -> None:
    assert list(steps) == [case.name for case in cases.find([], "gpu")]
    assert {name: step["plan"] for name, step in steps.items()} == PLANS


def test_nothing_falls_back_to_the_library(steps: dict[str, dict[str, Any]]) -> None:
    """On a GPU every norm and sum of a layer's products has a kernel of its own."""
    for name, step in steps.items():
        backends = {how.rpartition(", ")[2] for how in step["plan"]}
        assert backends <= {"triton", "cuda", "autograd"}, name
        assert step["cuda"]["finish_grads"] == 1, name


def test_stored_gradients_fit_a_quarter_of_the_memory(steps: dict[str, dict[str, Any]]) -> None:
    for name, step in steps.items():
        assert step["kept_bytes"] < 78 * 2**30 / 4, name
    kept = steps["encoder-t512-d1024-b16"]["kept_bytes"]
    everything = 4 * 16 * 4 * 12 * 1024**2  # float32, 16 samples, 12 d^2 weights in 4 blocks
    assert kept < everything / 2, "at bfloat16's ridge point Grams are cheaper than storing"
