"""Fixtures that every test may use.

Fresh memory is poisoned in the tests of everything that computes gradients, norms or noise: what
``torch.empty`` returns is full of NaN, so a value that nobody wrote cannot pass for a small one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# What the planner chooses must not depend on how busy the machine is.
os.environ.setdefault("DPKERNELS_RIDGE", "table")

if not torch.cuda.is_available():
    # Triton reads this when it is first imported, and other packages' tests may import it first.
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ["tests.lost_gpu"]

_POISONED_ROOMS = ("ops", "layers", "engine", "attacks")
_TESTS = Path(__file__).resolve().parent


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill fresh tensors with NaN (integers with their maximum) during the test."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture(autouse=True)
def _poison_where_it_matters(request: pytest.FixtureRequest) -> None:
    room = request.path.resolve().relative_to(_TESTS).parts[0]
    if room in _POISONED_ROOMS:
        request.getfixturevalue("poisoned_memory")


@pytest.fixture
def key() -> torch.Tensor:
    """A fixed ChaCha20 key, [4] int64."""
    return torch.tensor([0x0123456789ABCDEF, -7, 2**62 + 1, 42], dtype=torch.int64)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are left out where there is no CUDA device.

    Where the ``-m`` expression asks for them by name they are collected, and skipped.
    """
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if "gpu" in config.option.markexpr:
        for item in left_out:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        return
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
