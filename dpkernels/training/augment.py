"""Augmentations: MONAI dictionary transforms, whose draws depend on the seed of the run only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose, Randomizable
from monai.utils import convert_to_tensor

from dpkernels.training.targets import instantiate


class RandTurnd(Randomizable):
    """One of the eight symmetries of a square, each as likely, for images without an upright.

    Args:
        keys: names of the tensors [C, H, W] to turn alike.
    """

    def __init__(self, keys: str | Sequence[str]) -> None:
        self.keys = (keys,) if isinstance(keys, str) else tuple(keys)

    def __call__(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The dictionary with its tensors turned."""
        quarters, mirrored = self.R.randint(4), self.R.randint(2)
        turned = {key: torch.rot90(data[key], quarters, (1, 2)) for key in self.keys}
        return {**data, **{key: t.flip(2) if mirrored else t for key, t in turned.items()}}


def build_augmentation(blocks: Sequence[dict[str, Any]]) -> Compose | None:
    """The transforms of `data.augmentations`, one after the other; None without any.

    Raises:
        ValueError: a block cannot be built.
    """
    if not blocks:
        return None
    return Compose([instantiate(b, f"data.augmentations[{i}]") for i, b in enumerate(blocks)])


def augmented(
    augment: Compose, sample: dict[str, torch.Tensor], rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """A sample after the transforms, as plain tensors; `rng` decides what they draw."""
    augment.set_random_state(seed=int(rng.integers(2**31)))
    result = augment(sample)
    return {key: convert_to_tensor(result[key]) for key in sample}
