"""A run's data, network and evaluation: what every task shares, and what it has to fill in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from torch import nn

from dpkernels.training.augment import build_augmentation
from dpkernels.training.config import RunConfig
from dpkernels.training.progress import Display
from dpkernels.training.reading import split_patients
from dpkernels.training.run_folder import RunFolder, load_checkpoint
from dpkernels.training.store import PatientDataset, RecordStore

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound=RunConfig)
Store = TypeVar("Store", bound=RecordStore)
#: by class (or for all records): name of a metric to its value
Summary: TypeAlias = dict[str, dict[str, float]]
#: a dataclass of plain values: what was found for one held-out record
Result = TypeVar("Result", bound="DataclassInstance")


class TrainerBase(ABC, Generic[Config, Store, Result]):
    """What `Trainer` trains and measures; see there for the arguments.

    A task's trainer says `config_class` and `metric` and fills in the abstract methods.
    """

    config_class: ClassVar[type[RunConfig]]
    #: name of the metric that a run is judged by
    metric: ClassVar[str]

    config: Config
    folder: RunFolder
    display: Display
    device: torch.device
    _split: dict[str, list[str]]
    _opened: Store | None = None

    def evaluate(self) -> list[Result]:
        """Evaluate the run's weights on its held-out patients; writes metrics.json, overlays."""
        self.folder.check_writable()
        self._split = self.folder.read_json("split.json")
        network, records = self._trained_network(), self._records_of("test")
        self.folder.clear_overlays()
        title = f"Evaluating held-out {self._store().record}s"
        with self.display.counting(title, len(records)) as advance:
            results = self._measure(network, records, advance, final=True)
        self.folder.write_json(
            "metrics.json",
            {
                "summary": self._summary(results),
                "weights": "ema" if self.folder.average.exists() else "last",
                "cases": [asdict(result) for result in results],
            },
        )
        return results

    def predict(self, source: str | Path, target: str | Path) -> Sequence[Any]:
        """Apply the run's weights to new records; a task without this has no such command.

        Args:
            source: what to read.
            target: where to write.

        Returns:
            What was written, one item for each record.
        """
        raise NotImplementedError

    @abstractmethod
    def _open(self) -> Store:
        """The data of the configuration; nothing large is read yet.

        Raises:
            ValueError: a faulty data set, or a configuration that does not fit it.
        """

    @abstractmethod
    def _facts(self, folder: Any) -> dict[str, Any]:
        """What must be known of the data to build the network and to name its outputs.

        Args:
            folder: the cohort of the store that `_open` returned.
        """

    @abstractmethod
    def _build_network(self, seed: int) -> nn.Module:
        """The network for the data, initialised from `seed`."""

    @abstractmethod
    def _build_criterion(self) -> nn.Module:
        """The loss, a mean over rows."""

    @abstractmethod
    def _measure(
        self,
        network: nn.Module,
        records: Sequence[Any],
        on_progress: Callable[[], None],
        *,
        final: bool,
    ) -> list[Result]:
        """Predict held-out records and compare with the truth.

        Args:
            network: with the weights to measure.
            records: of patients who do not train.
            on_progress: called after each record.
            final: whether it is the evaluation of the run, with pictures and every metric, and
                not a point of the validation curve.
        """

    @abstractmethod
    def _summary(self, results: Sequence[Result]) -> Summary:
        """The metrics over all results."""

    @abstractmethod
    def _utility(self, summary: Summary) -> float:
        """The one number of a summary that a run is judged by."""

    def _by_products(self) -> Sequence[str]:
        """What this task shows outside the guarantee, beyond what every task does."""
        return ()

    def _store(self) -> Store:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _embedded(self, name: str, made: Any, write: Callable[..., Path]) -> Path:
        """The folder of the embedded data set, beside the run's; written where it is absent.

        Args:
            name: of the data set.
            made: dataclass of its arguments: how many records, their size, the seed.
            write: called with the folder, the fields of `made` and `on_progress`.
        """
        count, size, seed = asdict(made).values()
        folder = self.folder.root.parent / f"{name}-{count}x{size}-seed{seed}"
        with self.display.counting(f"Writing the {name} data", count) as advance:
            return write(folder, **asdict(made), on_progress=advance)

    def _known(self) -> dict[str, Any]:
        """`_facts`, from the run folder once it is written."""
        if self._opened is None and (self.folder.root / "data.json").exists():
            return self.folder.read_json("data.json")
        return self._facts(self._store().folder)

    def _split_patients(self) -> dict[str, list[str]]:
        """Patients by part: train, validation, test."""
        data = self.config.data
        return split_patients(
            list(self._store().folder.patients),
            data.test_share,
            data.validation_share,
            self.config.training.seed,
        )

    def _records_of(self, part: str) -> list[Any]:
        groups = self._store().folder.patients
        return [record for patient in self._split[part] for record in groups[patient]]

    def _training_set(self) -> PatientDataset:
        return PatientDataset(
            self._split["train"],
            self._store(),
            build_augmentation(self.config.data.augmentations),
            self.config.training.seed,
        )

    def _description(self) -> dict[str, Any]:
        """What must be known of the data to predict and to report without them.

        `view` is the shape of one view of a patient, `notes` are sentences for the report.
        """
        store = self._store()
        return {
            "root": str(store.folder.root),
            **self._facts(store.folder),
            "view": list(self._training_set()[0][0].shape[1:]),
            "unit": store.folder.unit,
            "patients": len(store.folder.patients),
            f"{store.record}s": len(store.folder.records),
            "notes": list(store.folder.notes),
        }

    def _validate(self, network: nn.Module) -> float | None:
        """The metric on the validation patients; None when there are none."""
        records = self._records_of("validation")
        results = self._measure(network, records, lambda: None, final=False) if records else []
        return self._utility(self._summary(results)) if results else None

    def _trained_network(self) -> nn.Module:
        """The network with the run's averaged weights, or its last ones where none are."""
        average, last = self.folder.average, self.folder.last
        network = self._build_network(seed=0)
        network.load_state_dict(load_checkpoint(average if average.exists() else last)["model"])
        return network.to(self.device)
