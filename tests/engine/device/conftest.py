"""The device that a test runs on, and the number format of its products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dpkernels.ops.registry import Op
from tests.ops.compare import tf32


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def full_float32() -> Iterator[None]:
    """Products of float32 without TF32, which PyTorch's convolutions on a GPU take by default."""
    with tf32(False):
        yield


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """By op that ran: the backends it ran on."""
    found: dict[str, set[str]] = {}
    original = Op._implementation

    def implementation(self: Op, arguments: tuple[Any, ...]) -> Any:
        found.setdefault(self.name, set()).add(self._choice(arguments))
        return original(self, arguments)

    monkeypatch.setattr(Op, "_implementation", implementation)
    return found
