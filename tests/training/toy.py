"""The smallest task: vectors in two classes, told apart by a linear layer; a run takes a moment.

Everything that a run has stands here once, so that a test of training needs no scans or images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from dpkernels.training.config import PrivacyConfig, RunConfig, TrainingConfig
from dpkernels.training.criteria import check_decomposable
from dpkernels.training.reading import for_each, split_patients
from dpkernels.training.sampling import PatientViews
from dpkernels.training.settings import merge
from dpkernels.training.targets import build_model, instantiate
from dpkernels.training.trainer import Trainer

FEATURES = 3


@dataclass(frozen=True)
class ToyData:
    """Patients that a run draws for itself; `damaged` ones cannot be read."""

    patients: int = 8
    test_share: float = 0.25
    validation_share: float = 0.0
    views_per_patient: int = 2
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class ToyConfig(RunConfig):
    """Everything that a toy run depends on."""

    presets: ClassVar = {
        "toy": {
            "data": {},
            "network": {"_target_": "torch.nn.Linear"},
            "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        }
    }

    data: ToyData
    network: dict
    loss: dict
    training: TrainingConfig = field(default_factory=TrainingConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    preset: str = ""


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


class ToyViews(PatientViews):
    """Views of each patient: its vector, [views, FEATURES], disturbed by seed, step and patient."""

    def __init__(self, patients: Sequence[str], views: int, seed: int = 0) -> None:
        self.patients = list(patients)
        self._views, self._seed = views, seed

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        number = int(self.patients[index][1:])
        rng = np.random.default_rng([self._seed, self.step, number])
        image = vector(number) + 0.3 * rng.normal(size=(self._views, FEATURES))
        label = torch.full((self._views,), number % 2)
        return torch.as_tensor(image, dtype=torch.float32), label


def vector(number: int) -> np.ndarray:
    """[FEATURES] of a patient; the sign of the first value is its class."""
    values = np.random.default_rng([7, number]).normal(size=FEATURES)
    return np.asarray([(1 if number % 2 else -1) * (1 + abs(values[0])), *values[1:]])


class ToyTrainer(Trainer[ToyConfig]):
    """Trains a linear layer on vectors; judged by accuracy on the test patients."""

    config_class = ToyConfig
    metric = "accuracy"

    def _open_data(self) -> None:
        self._patients = [f"p{number}" for number in range(self.config.data.patients)]

    def _read_data(self) -> None:
        def read(patient: str) -> None:
            if patient in self.config.data.damaged:
                raise ValueError(f"{patient}: not a readable vector")

        for_each(self._patients, read, "vectors")

    def _unit(self) -> str:
        return "patient"

    def _split_patients(self) -> dict[str, list[str]]:
        data = self.config.data
        return split_patients(
            self._patients, data.test_share, data.validation_share, self.config.training.seed
        )

    def _description(self) -> dict[str, Any]:
        return {"view": [FEATURES], "notes": ["Vectors were drawn."]}

    def _by_products(self) -> Sequence[str]:
        return ["That there are two classes is treated as public."]

    def _build_network(self, seed: int) -> nn.Module:
        channels = {"in_features": FEATURES, "out_features": 2}
        return build_model(self.config.network, channels, "the toy", seed)

    def _build_criterion(self) -> nn.Module:
        criterion = instantiate(self.config.loss, "loss")
        scores = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
        check_decomposable(criterion, scores, torch.arange(4) % 2, self.config.loss)
        return criterion

    def _training_set(self) -> ToyViews:
        seed = self.config.training.seed
        return ToyViews(self._split["train"], self.config.data.views_per_patient, seed)

    def _accuracy(self, network: nn.Module, part: str) -> float:
        numbers = [int(patient[1:]) for patient in self._split[part]]
        images = torch.tensor(np.stack([vector(n) for n in numbers]), dtype=torch.float32)
        training = network.training
        with torch.no_grad():
            right = network.eval()(images).argmax(1) == torch.tensor(numbers) % 2
        network.train(training)
        return float(right.float().mean())

    def _validate(self, network: nn.Module) -> float | None:
        return self._accuracy(network, "validation") if self._split["validation"] else None

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Evaluate the run in the folder again."""
        self._split = self.folder.read_json("split.json")
        return self._evaluate()

    def _evaluate(self) -> dict[str, dict[str, float]]:
        summary = {"all": {"accuracy": self._accuracy(self._trained_network(), "test")}}
        weights = "ema" if self._averaged() else "last"
        self.folder.write_json("metrics.json", {"summary": summary, "weights": weights})
        return summary

    def _utility(self, summary: dict[str, dict[str, float]]) -> float:
        return summary["all"]["accuracy"]
