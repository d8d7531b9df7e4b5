"""Poisson sampling of patients from the operating system's entropy."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import DataLoader

from dpkernels.training.processes import ALONE, TrainingProcesses
from dpkernels.training.store import PatientDataset


def flatten_views(batch: torch.Tensor) -> torch.Tensor:
    """[B, K, ...] to [B * K, ...]: row = patient * K + view."""
    return batch.flatten(0, 1)


class PoissonSampler(UniformWithReplacementSampler):
    """Endless batches into which every patient enters by a coin of their own.

    torch's CPU generator keeps 32 bits of a seed, so an attacker could try all of them; here every
    coin is 64 fresh bits of the operating system.

    Args:
        patients: number of patients N.
        sample_rate: chance q with which a patient enters a batch.
        insecure_seed: seed instead of entropy, for tests only.
        processes: of several, each keeps every n-th patient.
    """

    def __init__(
        self,
        patients: int,
        sample_rate: float,
        insecure_seed: int | None = None,
        processes: TrainingProcesses = ALONE,
    ) -> None:
        super().__init__(num_samples=patients, sample_rate=sample_rate)
        self.rank, self.num_replicas = processes.rank, processes.world_size
        self._share = np.arange(patients) % self.num_replicas == self.rank
        self._fixed = None if insecure_seed is None else np.random.default_rng(insecure_seed)

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield np.flatnonzero(self._share & (self._coins() < self.sample_rate)).tolist()

    def _coins(self) -> np.ndarray:
        """[N], float64, uniform on [0, 1)."""
        if self._fixed is not None:
            return np.asarray(self._fixed.random(self.num_samples))
        words = np.frombuffer(os.urandom(8 * self.num_samples), dtype=np.uint64)
        return np.asarray((words >> np.uint64(11)) * 2.0**-53)


def patient_batches(
    dataset: PatientDataset,
    sample_rate: float,
    insecure_seed: int | None = None,
    processes: TrainingProcesses = ALONE,
) -> DataLoader:
    """Endless Poisson batches: image [B, K, ...], label [B, K, ...]; B may be 0.

    The loader carries `sample_rate`, from which the engine takes what it accounts.
    """
    image, label = dataset[0]

    def collate(
        items: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not items:
            return image.new_zeros(0, *image.shape), label.new_zeros(0, *label.shape)
        images, labels = zip(*items, strict=True)
        return torch.stack(images), torch.stack(labels)

    sampler = PoissonSampler(len(dataset), sample_rate, insecure_seed, processes)
    loader: DataLoader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
    loader.sample_rate = sample_rate
    return loader
