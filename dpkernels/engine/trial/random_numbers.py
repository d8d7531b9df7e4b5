"""Torch's, numpy's and Python's global generators, which a trial seeds and leaves as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def kept(devices: Sequence[int] = ()) -> Iterator[None]:
    """Restore what the generators hold, of GPUs those of `devices` alone."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002 - models use it
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002


def seed_torch(seed: int, devices: Sequence[int] = ()) -> None:
    """Seed torch's generators, which :func:`kept` restores (``torch.manual_seed`` seeds all)."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        torch.cuda.default_generators[device].manual_seed(seed)


def seed_all(seed: int, devices: Sequence[int] = ()) -> None:
    """Seed the generators of all three."""
    seed_torch(seed, devices)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def states() -> tuple[Any, ...]:
    """What the generators of the CPU hold, to be compared."""
    arrays: Any = np.random.get_state()  # noqa: NPY002
    drawn = torch.get_rng_state().numpy().tobytes(), random.getstate(), arrays[1].tobytes()
    return *drawn, *arrays[2:]
