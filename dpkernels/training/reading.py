"""Reading data sets: every faulty item is named before training starts; patients are split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

_READERS = 4
_FAULTS_SHOWN = 10

Item = TypeVar("Item")


def for_each(items: Iterable[Item], action: Callable[[Item], None], what: str) -> None:
    """Do something with every item, several at a time, and collect what is wrong.

    Args:
        items: scans, images.
        action: raises ValueError for a faulty one.
        what: what the items are called, in the plural.

    Raises:
        ValueError: the faults, each by name.
    """

    def attempt(item: Item) -> str | None:
        try:
            action(item)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_READERS) as readers:
        faults = [fault for fault in readers.map(attempt, items) if fault is not None]
    if len(faults) == 1:
        raise ValueError(faults[0])
    if faults:
        more = [f"... and {len(faults) - _FAULTS_SHOWN} more"] * (len(faults) > _FAULTS_SHOWN)
        listed = "\n".join(f"- {fault}" for fault in faults[:_FAULTS_SHOWN] + more)
        raise ValueError(f"{len(faults)} {what} are faulty:\n{listed}")


def split_patients(
    patients: Sequence[str], test_share: float, validation_share: float, seed: int
) -> dict[str, list[str]]:
    """Split patients, never their images, into train, validation and test.

    Raises:
        ValueError: too few patients for the shares.
    """
    order = np.random.default_rng([seed, 2]).permutation(len(patients))
    test = max(1, round(test_share * len(patients)))
    validation = max(1, round(validation_share * len(patients))) if validation_share else 0
    if len(patients) - test - validation < 1:
        raise ValueError(
            f"{len(patients)} patients are too few for data.test_share={test_share:.3g} and "
            f"data.validation_share={validation_share:.3g}: none is left to train on"
        )
    names = [patients[i] for i in order]
    return {
        "train": sorted(names[test + validation :]),
        "validation": sorted(names[test : test + validation]),
        "test": sorted(names[:test]),
    }
