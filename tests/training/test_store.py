"""Prepared records, and the views of patients that training draws from them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dpkernels.training.cohort import Cohort
from dpkernels.training.config import DatasetConfig
from dpkernels.training.store import PatientDataset, RecordStore


@dataclass(frozen=True)
class Number:
    name: str
    patient_id: str


class Numbers(RecordStore[Number, torch.Tensor]):
    """A record is its number; a view of it lies up to a half above. Negative ones are damaged."""

    record = "number"

    def __init__(self, *names: str, **settings) -> None:
        numbers = tuple(Number(name, name[-1]) for name in names)
        super().__init__(Cohort(Path("data"), numbers, "digit", ()), DatasetConfig(**settings))
        self.loaded = Counter()

    def load(self, record):
        self.loaded[record.name] += 1
        if record.name.startswith("-"):
            raise ValueError(f"{record.name}: below zero")
        return torch.tensor([float(record.name)])

    def view(self, record, rng):
        label = torch.tensor(int(record.name) % 2, dtype=torch.uint8)
        return self.item(record) + 0.5 * rng.random(dtype="float32"), label


def test_with_a_cache_records_are_read_once():
    kept, fresh = Numbers("1", "2"), Numbers("1", "2", cache="none")
    for store in (kept, fresh):
        seen = []
        store.read_all(lambda seen=seen: seen.append(1))
        assert len(seen) == 2
        assert store.item(store.folder.records[1]) == 2
    assert kept.loaded == {"1": 1, "2": 1}
    assert fresh.loaded == {"1": 1, "2": 2}


def test_every_faulty_record_is_named_before_training():
    with pytest.raises(ValueError, match=r"(?s)2 numbers are faulty:.*-3.*-5"):
        Numbers("1", "-3", "4", "-5").read_all()


def test_views_come_from_every_record_of_the_patient_and_from_no_other():
    store = Numbers("1", "21", "32", views_per_patient=40)
    image, label = PatientDataset(["2", "1"], store, None, seed=0)[1]
    assert image.shape == (40, 1)
    assert {int(value) for value in image} == {1, 21}
    assert label.tolist() == [1] * 40
    assert label.dtype == torch.uint8


def test_views_depend_on_seed_step_and_patient_only():
    def drawn(seed, step):
        dataset = PatientDataset(["1", "2"], Numbers("1", "2"), None, seed)
        dataset.step = step
        return dataset[0][0]

    assert torch.equal(drawn(0, 3), drawn(0, 3))
    assert not torch.equal(drawn(0, 3), drawn(0, 4))
    assert not torch.equal(drawn(0, 3), drawn(1, 3))


def test_augmentations_are_seeded_and_keep_the_types():
    class Shift:
        def set_random_state(self, seed):
            self.by = seed % 1000 / 1000

        def __call__(self, sample):
            return {"image": sample["image"].double() + self.by, "label": sample["label"].float()}

    plain, moved, again = (
        PatientDataset(["1"], Numbers("1"), augment, seed=0)[0]
        for augment in (None, Shift(), Shift())
    )
    assert not torch.equal(moved[0], plain[0])
    assert torch.equal(moved[0], again[0])
    assert (moved[0].dtype, moved[1].dtype) == (torch.float32, torch.uint8)
