"""Poisson sampling with exactly the rate and the number of steps that are accounted."""

from __future__ import annotations

import warnings
from collections.abc import Sized
from typing import Any

from opacus.data_loader import DPDataLoader
from opacus.utils.uniform_sampler import (
    DistributedUniformWithReplacementSampler,
    UniformWithReplacementSampler,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

_POISSON = (UniformWithReplacementSampler, DistributedUniformWithReplacementSampler)


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
    return min(1.0, size / dataset_size_of(data_loader))


def dataset_size_of(data_loader: DataLoader) -> int:
    """The number of records; an error where the dataset does not know it."""
    dataset = data_loader.dataset
    if not isinstance(dataset, Sized):
        raise ValueError(
            f"data_loader: its dataset {type(dataset).__name__} has no length, so the sampling "
            "rate is unknown; expected one with __len__"
        )
    return len(dataset)


def expected_batch_size_of(data_loader: DataLoader) -> float:
    """q * N, as an int where it is one: 64 / 1000 * 1000 is 64, not 64.00000000000001."""
    size = sample_rate_of(data_loader) * dataset_size_of(data_loader)
    return round(size) if abs(size - round(size)) < 1e-9 * max(size, 1.0) else size


def draws_every_record_alike(data_loader: DataLoader) -> bool:
    """Whether the loader shuffles or walks through its dataset, or is a Poisson loader already."""
    if isinstance(data_loader.batch_sampler, _POISSON):
        return True
    if type(data_loader.batch_sampler) is not BatchSampler:
        return False
    sampler = data_loader.batch_sampler.sampler
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement
    return isinstance(sampler, (SequentialSampler, DistributedSampler))


def refuse_other_samplers(data_loader: DataLoader) -> None:
    """Raise where Poisson sampling would silently replace a sampler that draws otherwise."""
    if isinstance(data_loader.dataset, IterableDataset):
        raise ValueError("Uniform sampling is not supported for IterableDataset")
    if not draws_every_record_alike(data_loader):
        raise ValueError(
            f"data_loader: its sampler {_sampler_name(data_loader)} does not draw every record "
            "alike, and Poisson sampling would replace it. Use torch.utils.data.Subset for a part "
            "of the data and uniform sampling, or poisson_sampling=False (then epsilon does not "
            "hold)"
        )


def warn_of_other_samplers(data_loader: DataLoader) -> None:
    """State that epsilon does not hold for a sampler that is kept and draws otherwise."""
    iterable = isinstance(data_loader.dataset, IterableDataset)
    if iterable or not draws_every_record_alike(data_loader):
        warnings.warn(
            f"poisson_sampling=False keeps the sampler {_sampler_name(data_loader)}: epsilon is "
            "computed for Poisson sampling with the rate batch_size / len(dataset) and does not "
            "hold for it",
            stacklevel=3,
        )


def _sampler_name(data_loader: DataLoader) -> str:
    batch_sampler = data_loader.batch_sampler
    if type(batch_sampler) is BatchSampler:
        return type(batch_sampler.sampler).__name__
    return type(batch_sampler).__name__


def poisson_loader(data_loader: DataLoader, **kwargs: Any) -> DPDataLoader:
    """A Poisson-sampling twin of `data_loader`: same rate q, as many steps as it had batches."""
    refuse_other_samplers(data_loader)
    steps = len(data_loader)
    rate = sample_rate_of(data_loader)
    twin = DPDataLoader.from_data_loader(data_loader, **kwargs)
    twin.sample_rate = twin.batch_sampler.sample_rate = rate
    twin.batch_sampler.steps = steps
    return twin
