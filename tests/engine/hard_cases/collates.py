"""Data sets and collate functions that the tests of the loader's trial share."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, default_collate

from dpkernels.engine.trial.collate import refuse_mixing_collate
from tests.engine.support import images


class Texts(Dataset):
    """Records of different lengths, with labels; counts how often each one is read."""

    def __init__(self, lengths: tuple[int, ...] = (4, 2, 7, 3, 5, 1, 6, 8)) -> None:
        generator = torch.Generator().manual_seed(1)
        self.records = [
            {"ids": torch.randint(1, 50, (n,), generator=generator), "label": i}
            for i, n in enumerate(lengths)
        ]
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.reads.append(i)
        return self.records[i]


def tried(
    collate: Any, dataset: Any = None, batch_first: bool = True, batch_size: int | None = 4
) -> list[str]:
    """What the trial warns of."""
    dataset = images(12) if dataset is None else dataset
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refuse_mixing_collate(loader, batch_first)
    return [str(warning.message) for warning in caught]


def mix_up(records: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """MixUp as its authors wrote it."""
    x, y = default_collate(records)
    share, order = np.random.beta(0.4, 0.4), torch.randperm(len(x))  # noqa: NPY002
    targets = F.one_hot(y, 2).float()
    return share * x + (1 - share) * x[order], share * targets + (1 - share) * targets[order]


def stacked(records: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = zip(*records)
    return torch.stack(x), torch.stack(y)


def padded(records: list[Any], side: str = "right") -> dict[str, torch.Tensor]:
    rows = pad_sequence([r["ids"] for r in records], batch_first=True, padding_side=side)
    return {"ids": rows, "mask": rows != 0, "label": torch.tensor([r["label"] for r in records])}
