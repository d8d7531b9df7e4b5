"""Prepared records of a data set, and the views of its patients that a network trains on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from monai.transforms import Compose
from torch.utils.data import Dataset

from dpkernels.training.augment import augmented
from dpkernels.training.cohort import Cohort, Identified, Record
from dpkernels.training.config import DatasetConfig
from dpkernels.training.reading import for_each

Item = TypeVar("Item")


class RecordStore(ABC, Generic[Record, Item]):
    """Prepared records, read once (cache "memory") or on every access ("none").

    Args:
        folder: the records.
        config: how they are prepared.
    """

    #: what a record is called
    record: str

    def __init__(self, folder: Cohort[Record], config: DatasetConfig) -> None:
        self.folder = folder
        self.config = config
        self._items: dict[str, Item] = {}

    def read_all(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """Read every record, before any training.

        Raises:
            ValueError: the faulty files, each by name.
        """

        def read(record: Record) -> None:
            item = self.load(record)
            if self.config.cache == "memory":
                self._items[record.name] = item
            on_progress()

        for_each(self.folder.records, read, f"{self.record}s")

    def item(self, record: Record) -> Item:
        """The prepared record."""
        kept = self._items.get(record.name)
        return self.load(record) if kept is None else kept

    @abstractmethod
    def load(self, record: Record) -> Item:
        """Read a record from disk and prepare it.

        Raises:
            ValueError: it is faulty; the message names the file.
        """

    @abstractmethod
    def view(self, record: Record, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """One view of a record, not augmented yet: image and label; `rng` decides what it shows."""


class PatientDataset(Dataset):
    """One item per patient (the privacy unit): K views, augmented, as adjacent rows.

    A view is drawn from any of the patient's records. What is drawn depends only on the seed, the
    step and the patient, so a resumed run draws what the uninterrupted one would have.

    Args:
        patients: identifiers of the patients to train on.
        store: where their records are.
        augment: changes a view; None leaves it as it is.
        seed: of the draws.

    Attributes:
        step: of the run; the training loop sets it.
    """

    step: int = 0

    def __init__(
        self,
        patients: Sequence[str],
        store: RecordStore,
        augment: Compose | None,
        seed: int,
    ) -> None:
        self.patients = list(patients)
        self.store = store
        self._augment = augment
        self._seed = seed
        self._records = store.folder.patients

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The patient's views: image [K, ...] float32, and label [K, ...] as the store gives it."""
        rng = np.random.default_rng([self._seed, self.step, index])
        records = self._records[self.patients[index]]
        views = [
            self._view(records[int(rng.integers(len(records)))], rng)
            for _ in range(self.store.config.views_per_patient)
        ]
        images, labels = zip(*views, strict=True)
        return torch.stack(images).contiguous(), torch.stack(labels)

    def _view(
        self, record: Identified, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.store.view(record, rng)
        if self._augment is None:
            return image, label
        sample = augmented(self._augment, {"image": image, "label": label}, rng)
        return sample["image"].float(), sample["label"].to(label.dtype)
