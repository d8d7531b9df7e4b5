"""The smallest task: vectors in two classes, told apart by a linear layer; a run takes a moment.

Everything that a run has stands here once, so that a test of training needs no scans or images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from dpkernels.training.cohort import Cohort
from dpkernels.training.config import DatasetConfig, RunConfig
from dpkernels.training.criteria import class_criterion
from dpkernels.training.settings import merge
from dpkernels.training.store import PatientDataset, RecordStore
from dpkernels.training.targets import build_model, evaluating
from dpkernels.training.trainer import Trainer

FEATURES = 3


@dataclass(frozen=True)
class ToyData(DatasetConfig):
    """Patients that a run draws for itself; `damaged` ones cannot be read."""

    patients: int = 8
    test_share: float = 0.25
    views_per_patient: int = 2
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ToyConfig(RunConfig):
    """Everything that a toy run depends on."""

    presets: ClassVar = {"toy": {"data": {}, "network": {"_target_": "torch.nn.Linear"}}}

    data: ToyData


@dataclass(frozen=True)
class Vector:
    """The record of one patient; both have one name."""

    name: str

    @property
    def patient_id(self) -> str:
        return self.name


@dataclass(frozen=True)
class ToyResult:
    """One held-out patient."""

    patient_id: str
    right: bool


_TINY = {
    "training": {
        "steps": 3,
        "batch_size": 2,
        "device": "cpu",
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    },
    "privacy": {"max_grad_norm": 0.5},
}


def tiny(changes: dict[str, Any] | None = None) -> ToyConfig:
    """A configuration of three steps on six training patients, with nested changes."""
    return ToyConfig.from_preset("toy", merge(_TINY, changes or {}))


class ToyStore(RecordStore[Vector, torch.Tensor]):
    """Vectors, [FEATURES]."""

    record = "vector"
    config: ToyData

    def load(self, record: Vector) -> torch.Tensor:
        if record.name in self.config.damaged:
            raise ValueError(f"{record.name}: not a readable vector")
        return torch.as_tensor(vector(int(record.name[1:])), dtype=torch.float32)

    def view(self, record: Vector, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.as_tensor(rng.normal(size=FEATURES), dtype=torch.float32)
        return self.item(record) + 0.3 * noise, torch.tensor(label(record))


def store_of(names: Sequence[str], data: ToyData) -> ToyStore:
    """The vectors of the patients of these names."""
    vectors = tuple(map(Vector, names))
    return ToyStore(Cohort(Path("drawn"), vectors, "patient", ("Vectors were drawn.",)), data)


class ToyViews(PatientDataset):
    """Views of each patient: its vector, [views, FEATURES], disturbed by seed, step and patient."""

    def __init__(self, patients: Sequence[str], views: int, seed: int = 0) -> None:
        super().__init__(patients, store_of(patients, ToyData(views_per_patient=views)), None, seed)


def label(record: Vector) -> int:
    """0 or 1."""
    return int(record.name[1:]) % 2


def vector(number: int) -> np.ndarray:
    """[FEATURES] of a patient; the sign of the first value is its class."""
    values = np.random.default_rng([7, number]).normal(size=FEATURES)
    return np.asarray([(1 if number % 2 else -1) * (1 + abs(values[0])), *values[1:]])


class ToyTrainer(Trainer[ToyConfig, ToyStore, ToyResult]):
    """Trains a linear layer on vectors; judged by accuracy on the test patients."""

    config_class = ToyConfig
    metric = "accuracy"

    def _open(self) -> ToyStore:
        return store_of([f"p{n}" for n in range(self.config.data.patients)], self.config.data)

    def _facts(self, folder: Cohort) -> dict[str, Any]:
        return {"classes": 2}

    def _by_products(self) -> Sequence[str]:
        return ["That there are two classes is treated as public."]

    def _build_network(self, seed: int) -> nn.Module:
        channels = {"in_features": FEATURES, "out_features": self._known()["classes"]}
        return build_model(self.config.network, channels, "the toy", seed)

    def _build_criterion(self) -> nn.Module:
        return class_criterion(self.config.loss, self._known()["classes"])

    def _measure(
        self,
        network: nn.Module,
        records: Sequence[Vector],
        on_progress: Callable[[], None],
        *,
        final: bool,
    ) -> list[ToyResult]:
        results = []
        for record in records:
            with evaluating(network):
                scores = network(self._store().item(record))
            results.append(ToyResult(record.name, int(scores.argmax()) == label(record)))
            on_progress()
        return results

    def _summary(self, results: Sequence[ToyResult]) -> dict[str, dict[str, float]]:
        return {"all": {"accuracy": sum(r.right for r in results) / len(results)}}

    def _utility(self, summary: dict[str, dict[str, float]]) -> float:
        return summary["all"]["accuracy"]
