"""Poisson sampling with exactly the rate and the number of steps that are accounted."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import torch
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

from dpkernels.engine.processes.collectives import Processes

_POISSON = (UniformWithReplacementSampler, DistributedUniformWithReplacementSampler)


def sample_rate_of(data_loader: DataLoader) -> float:
    """The rate q at which one record enters a batch.

    A Poisson loader states q. Otherwise q is ``batch_size / len(dataset)``, at most 1, and not
    ``1 / len(data_loader)``, which differs where the batch size does not divide the dataset; a
    batch sampler without ``batch_size`` leaves only the latter. Under a ``DistributedSampler`` one
    step consists of ``num_replicas`` batches, one per process.
    """
    if hasattr(data_loader, "sample_rate"):
        return float(data_loader.sample_rate)
    size = getattr(data_loader.batch_sampler, "batch_size", None)
    if size is None:
        return 1.0 / len(data_loader)
    sampler = getattr(data_loader.batch_sampler, "sampler", None)
    replicas = sampler.num_replicas if isinstance(sampler, DistributedSampler) else 1
    return min(1.0, size * replicas / dataset_size_of(data_loader))


def dataset_size_of(data_loader: DataLoader) -> int:
    """The number of records; ``ValueError`` where the dataset has no length."""
    dataset = data_loader.dataset
    if not isinstance(dataset, Sized):
        raise ValueError(
            f"data_loader: its dataset {type(dataset).__name__} has no length, so the sampling "
            "rate is unknown; expected one with __len__"
        )
    return len(dataset)


def expected_batch_size_of(data_loader: DataLoader, world_size: int = 1) -> float:
    """q * N, as an int where only rounding separates it from an int (64 / 1000 * 1000 is 64).

    In several processes, the expected batch size of one process, as in Opacus.
    """
    size = sample_rate_of(data_loader) * dataset_size_of(data_loader) / world_size
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
    """Refuse to replace, by Poisson sampling, a sampler that does not draw every record alike."""
    if isinstance(data_loader.dataset, IterableDataset):
        raise ValueError("Uniform sampling is not supported for IterableDataset")
    if not draws_every_record_alike(data_loader):
        raise ValueError(
            f"data_loader: its sampler {_sampler_name(data_loader)} does not draw every record "
            "alike, and Poisson sampling would replace it. Use torch.utils.data.Subset for a part "
            "of the data and uniform sampling, or poisson_sampling=False (then epsilon does not "
            "hold)"
        )


def refuse_random_rows(data_loader: DataLoader, rand_on_empty: bool) -> None:
    """Raise where an empty batch would become a row of random numbers.

    The engine could not tell the random row from a sample, so the sums of an empty batch and of a
    batch of one record would differ by two clipped gradients instead of one.
    """
    if rand_on_empty or getattr(data_loader.collate_fn, "rand_on_empty", False):
        raise ValueError(
            "rand_on_empty=True: the random row of an empty batch would count as a sample, so one "
            "record could move the sum by twice max_grad_norm; leave it False (an empty batch "
            "runs through model and loss as it is, and its step is noise alone)"
        )


def warn_of_other_samplers(data_loader: DataLoader) -> None:
    """Warn that epsilon does not hold for a kept sampler that does not draw every record alike."""
    if not draws_every_record_alike(data_loader):
        warnings.warn(
            f"poisson_sampling=False keeps the sampler {_sampler_name(data_loader)}: epsilon is "
            "computed for Poisson sampling with the rate batch_size / len(dataset) and does not "
            "hold for it",
            stacklevel=3,
        )


def warn_of_another_dataset(counted: object, given: object) -> None:
    """Warn that the steps of an engine are counted for one dataset, where another one is given."""
    if counted is not given and counted != given:
        warnings.warn(
            "PrivacyEngine detected new dataset object: epsilon is counted for one dataset, so "
            "make a new PrivacyEngine unless this is the same data as before",
            stacklevel=4,
        )


def _sampler_name(data_loader: DataLoader) -> str:
    batch_sampler = data_loader.batch_sampler
    if type(batch_sampler) is BatchSampler:
        return type(batch_sampler.sampler).__name__
    return type(batch_sampler).__name__


class DistributedPoissonSampler(DistributedUniformWithReplacementSampler):
    """Poisson sampling of one process's share of the records; equally many steps in each process.

    Records are dealt out alike on every process, by ``shuffle_seed`` and epoch. Unlike Opacus'
    sampler, this sampler yields empty batches too: a process that left them out would end early,
    and others would wait. Each process draws from a stream of its own, also where all processes are
    seeded alike: with the same draws, the records at one place of the shares would always be drawn
    together, and sampling would hide none of them.

    Args:
        total_size: number of records of all processes.
        sample_rate: probability q with which each record enters a batch.
        steps: number of batches.
        processes: the processes that train together.
        generator: seeds the draws; None for PyTorch's global generator.
    """

    def __init__(
        self,
        *,
        total_size: int,
        sample_rate: float,
        steps: int,
        processes: Processes,
        generator: torch.Generator | None = None,
    ):
        super().__init__(
            total_size=total_size, sample_rate=sample_rate, steps=steps, generator=generator
        )
        self.rank, self.num_replicas = processes.rank, processes.world_size
        self.num_samples = len(range(self.rank, total_size, self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        dealt = torch.Generator().manual_seed(self.shuffle_seed + self.epoch)
        records = torch.randperm(self.total_size, generator=dealt)
        own = records[self.rank :: self.num_replicas]
        seed = int(torch.randint(2**62, (), generator=self.generator))
        digest = hashlib.sha256(f"{seed} {self.rank}".encode()).digest()
        draws = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        for _ in range(self.num_batches):
            yield own[torch.rand(len(own), generator=draws) < self.sample_rate].tolist()


class SystemPoissonSampler(UniformWithReplacementSampler):
    """Poisson batches drawn by the operating system's generator: nobody can predict the records.

    64 bits decide on each record, so the rate is `sample_rate` or less, by at most 2^-64.
    """

    def __iter__(self) -> Iterator[list[int]]:
        limit = int(self.sample_rate * 2**64)
        for _ in range(self.steps):
            draws = np.frombuffer(os.urandom(8 * self.num_samples), dtype=np.uint64)
            joins = draws < limit if limit < 2**64 else np.ones(self.num_samples, dtype=bool)
            yield np.flatnonzero(joins).tolist()


def poisson_loader(
    data_loader: DataLoader,
    processes: Processes | None = None,
    *,
    secure: bool = False,
    **kwargs: Any,
) -> DPDataLoader:
    """A Poisson-sampling version of `data_loader`: same rate q, a step for each of its batches.

    Args:
        data_loader: a loader that draws every record alike.
        processes: the processes that train together, each sampling from its share of the records.
        secure: draw by the operating system's generator (in one process) instead of torch's.
        **kwargs: arguments of ``DPDataLoader.from_data_loader``.
    """
    refuse_other_samplers(data_loader)
    steps = len(data_loader)
    rate = sample_rate_of(data_loader)
    twin = DPDataLoader.from_data_loader(data_loader, **kwargs)
    # set through vars(): a DataLoader refuses to have its batch_sampler replaced
    if secure:
        vars(twin)["batch_sampler"] = SystemPoissonSampler(
            num_samples=dataset_size_of(data_loader), sample_rate=rate, steps=steps
        )
    if processes is None or processes.world_size == 1:
        twin.sample_rate = twin.batch_sampler.sample_rate = rate
        twin.batch_sampler.steps = steps
        return twin
    twin.sample_rate = rate
    twin.distributed = True
    vars(twin)["batch_sampler"] = DistributedPoissonSampler(
        total_size=dataset_size_of(data_loader),
        sample_rate=rate,
        steps=steps,
        processes=processes,
        generator=twin.generator,
    )
    return twin


def check_shared(data_loader: DataLoader, processes: Processes, poisson_sampling: bool) -> None:
    """Check that processes share no record of a step, and make equally many steps."""
    if processes.world_size == 1:
        return
    processes.agree(
        dataset_size=dataset_size_of(data_loader),
        sample_rate=sample_rate_of(data_loader),
        steps=len(data_loader),
    )
    if poisson_sampling:
        return
    sampler = getattr(data_loader.batch_sampler, "sampler", data_loader.batch_sampler)
    share = getattr(sampler, "rank", None), getattr(sampler, "num_replicas", None)
    if share != (processes.rank, processes.world_size):
        raise ValueError(
            "data_loader: with poisson_sampling=False every process would draw from all records, "
            "so one could enter a step several times; give it a torch.utils.data."
            f"DistributedSampler(dataset, num_replicas={processes.world_size}, "
            f"rank={processes.rank}), or a sampler of your own that states its share by the same "
            "two attributes"
        )
