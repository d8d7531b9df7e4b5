"""Where the Triton tests run: on CUDA tensors (marked ``gpu``) or under Triton's interpreter.

Triton reads TRITON_INTERPRET when it is first imported; tests/conftest.py sets it where there is no
CUDA device. Every module of Triton tests loads its kernels through :func:`load`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MARKS = [pytest.mark.gpu] if DEVICE == "cuda" else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load(name: str) -> ModuleType:
    """A module that imports Triton."""
    return importlib.import_module(name)


def on_device(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors where the kernels run, strides kept."""
    if DEVICE == "cpu":
        return tensors
    return tuple(_moved(tensor) for tensor in tensors)


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.numel():
        return tensor.to(DEVICE)
    reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.as_strided((reach,), (1,)).to(DEVICE)
    return memory.as_strided(tensor.shape, tensor.stride())
