"""Poisson sampling with exactly the rate and the number of steps that are accounted."""

from __future__ import annotations

from typing import Any

import torch
from opacus.data_loader import DPDataLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)


def sample_rate_of(data_loader: DataLoader) -> float:
    """The rate q at which one record enters a batch.

    A Poisson loader states it. Otherwise it is ``batch_size / len(dataset)``, at most 1: not
    ``1 / len(data_loader)``, which differs where the batch size does not divide the dataset.
    """
    if hasattr(data_loader, "sample_rate"):
        return float(data_loader.sample_rate)
    size = getattr(data_loader.batch_sampler, "batch_size", None)
    if size is None:
        return 1.0 / len(data_loader)
    return min(1.0, size / len(data_loader.dataset))


def refuse_other_samplers(data_loader: DataLoader) -> None:
    """Raise where Poisson sampling would silently replace a sampler that draws otherwise."""
    if isinstance(data_loader.dataset, IterableDataset):
        raise ValueError("Uniform sampling is not supported for IterableDataset")
    batch_sampler = data_loader.batch_sampler
    if isinstance(data_loader, DPDataLoader) or type(batch_sampler) is not BatchSampler:
        return
    sampler = batch_sampler.sampler
    uniform = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler) and not sampler.replacement
    )
    if not uniform and not isinstance(sampler, torch.utils.data.distributed.DistributedSampler):
        raise ValueError(
            f"data_loader: its sampler {type(sampler).__name__} does not draw every record alike, "
            "and Poisson sampling would replace it. Use torch.utils.data.Subset for a part of the "
            "data and uniform sampling, or poisson_sampling=False (then epsilon does not hold)"
        )


def poisson_loader(data_loader: DataLoader, **kwargs: Any) -> DPDataLoader:
    """A Poisson-sampling twin of `data_loader`: same rate q, as many steps as it had batches."""
    refuse_other_samplers(data_loader)
    steps = len(data_loader)
    rate = sample_rate_of(data_loader)
    twin = DPDataLoader.from_data_loader(data_loader, **kwargs)
    twin.sample_rate = twin.batch_sampler.sample_rate = rate
    twin.batch_sampler.steps = steps
    return twin
