"""The examples run, train, and count exactly the steps that they take."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, _EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_loop() -> None:
    assert example("plain_loop").main() > 0.8


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_trainer() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    engine = example("hugging_face_trainer").main(epochs=2)
    assert engine.accountant.history == [(1.0, 32 / 256, 16)]


@pytest.mark.filterwarnings("ignore")
def test_lightning_trainer() -> None:
    pytest.importorskip("lightning")
    engine = example("lightning_trainer").main(epochs=2)
    assert engine.accountant.history == [(1.0, 64 / 512, 16)]
