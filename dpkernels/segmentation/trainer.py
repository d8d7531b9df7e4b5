"""The trainer: a Decathlon folder and a configuration in, a run folder with its report out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dpkernels.segmentation import pictures
from dpkernels.segmentation.config import SegmentationConfig
from dpkernels.segmentation.data import CaseStore, PatientDataset
from dpkernels.segmentation.decathlon import Scan, read_decathlon
from dpkernels.segmentation.evaluate import CaseResult, Predictor, evaluate_scans, summarise
from dpkernels.segmentation.loss import build_loss
from dpkernels.segmentation.model import build_network, total_stride
from dpkernels.segmentation.phantom import write_phantom
from dpkernels.segmentation.predict import predict_path
from dpkernels.segmentation.volume import Volume
from dpkernels.training.augment import build_augmentation
from dpkernels.training.reading import split_patients
from dpkernels.training.trainer import Trainer


class SegmentationTrainer(Trainer[SegmentationConfig]):
    """Train, resume, evaluate and predict on 3D scans; the privacy unit is the patient.

    See `dpkernels.training.trainer.Trainer` for the arguments, `fit`, `from_run`,
    `privacy_report` and the guarantee.
    """

    config_class = SegmentationConfig
    metric = "Dice"

    _opened: CaseStore | None = None

    def evaluate(self) -> list[CaseResult]:
        """Evaluate the run's weights on its held-out patients; writes metrics.json, overlays."""
        self.folder.check_writable()
        self._split = self.folder.read_json("split.json")
        return self._evaluate_cases()

    def predict(self, source: str | Path, target: str | Path) -> list[Path]:
        """Segment a NIfTI file, or every one in a folder, onto its native grid.

        Args:
            source: file or folder.
            target: folder for the label maps; they keep the names of their images.

        Returns:
            The written files.

        Raises:
            ValueError: no scan found, or a faulty one.
        """
        data = self.folder.read_json("data.json")
        channels = len(data["modalities"])
        network = self._trained_network()
        predictor = Predictor(network, self.config, self.device)
        return predict_path(
            predictor,
            self.config.data,
            Path(source),
            Path(target),
            channels=channels,
            divisor=total_stride(self.config.network),
            display=self.display,
        )

    def _unit(self) -> str:
        return "patient" if self._open_store().folder.grouped else "scan"

    def _open_data(self) -> None:
        self._open_store()

    def _read_data(self) -> None:
        scans = len(self._open_store().folder.scans)
        with self.display.counting("Reading and checking scans", scans) as advance:
            self._open_store().read_all(advance)

    def _split_patients(self) -> dict[str, list[str]]:
        data = self.config.data
        return split_patients(
            list(self._open_store().folder.patients),
            data.test_share,
            data.validation_share,
            self.config.training.seed,
        )

    def _description(self) -> dict[str, Any]:
        store, folder = self._open_store(), self._open_store().folder
        size = store.config.crop or tuple(store.case(folder.scans[0]).image.shape[1:])
        return {
            "root": str(folder.root),
            "labels": folder.labels,
            "modalities": list(folder.modalities),
            "view": [len(folder.modalities), *size],
            "patients": len(folder.patients),
            "scans": len(folder.scans),
            "notes": list(folder.notes),
        }

    def _by_products(self) -> Sequence[str]:
        texts = []
        if self.config.data.validation_share:
            texts.append("The validation curve shows validation patients; it steers nothing here.")
        if self.config.data.intensity == "zscore":
            texts.append(
                "Intensities are normalised by each scan's own mean and deviation; no statistic "
                "crosses patients."
            )
        return texts

    def _open_store(self) -> CaseStore:
        if self._opened is None:
            root = self.config.data.root or self._phantom_folder()
            folder = read_decathlon(root, self.config.data.patients_csv)
            if self.config.data.intensity == "window" and set(folder.modalities) != {"CT"}:
                raise ValueError(
                    f"data.intensity: a Hounsfield window fits CT only, but dataset.json lists "
                    f"{', '.join(folder.modalities)}; use data.intensity=zscore"
                )
            divisor = total_stride(self.config.network)
            crop = self.config.data.crop
            if crop is not None and any(size % divisor for size in crop):
                raise ValueError(
                    f"data.crop must be multiples of {divisor}, the network's total stride; got "
                    f"{list(crop)}"
                )
            self._opened = CaseStore(folder, self.config.data, divisor)
        return self._opened

    def _phantom_folder(self) -> Path:
        phantom = self.config.data.phantom
        name = f"phantom-{phantom.patients}x{phantom.size}-seed{phantom.seed}"
        with self.display.counting("Writing the phantom", phantom.patients) as advance:
            return write_phantom(
                self.folder.root.parent / name,
                patients=phantom.patients,
                size=phantom.size,
                seed=phantom.seed,
                on_progress=advance,
            )

    def _build_network(self, seed: int) -> nn.Module:
        labels, modalities = self._classes()
        return build_network(
            self.config.network, in_channels=modalities, out_channels=labels, seed=seed
        )

    def _classes(self) -> tuple[int, int]:
        """Number of classes and of modalities: from the run folder once it is written."""
        if self._opened is None and (self.folder.root / "data.json").exists():
            data = self.folder.read_json("data.json")
            return len(data["labels"]), len(data["modalities"])
        return len(self._open_store().folder.labels), len(self._open_store().folder.modalities)

    def _build_criterion(self) -> nn.Module:
        return build_loss(self.config.loss, self._classes()[0])

    def _training_set(self) -> PatientDataset:
        return PatientDataset(
            self._split["train"],
            self._open_store(),
            build_augmentation(self.config.data.augmentations),
            self.config.training.seed,
        )

    def _validate(self, network: nn.Module) -> float | None:
        predictor = Predictor(network, self.config, self.device)
        results = evaluate_scans(
            predictor, self._open_store(), self._scans_of("validation"), surface_distance=False
        )
        return self._utility(summarise(results)) if results else None

    def _evaluate(self) -> dict[str, dict[str, float]]:
        return summarise(self._evaluate_cases())

    def _utility(self, summary: dict[str, dict[str, float]]) -> float:
        """Dice of the first class: the organ, where the others are lesions in it."""
        return next(iter(summary.values()))["dice"]

    def _scans_of(self, part: str) -> list[Scan]:
        groups = self._open_store().folder.patients
        return [scan for patient in self._split[part] for scan in groups[patient]]

    def _evaluate_cases(self) -> list[CaseResult]:
        store = self._open_store()
        scans = self._scans_of("test")
        network = self._trained_network()
        self.folder.clear_overlays()
        drawn = 0
        with self.display.counting("Evaluating held-out patients", len(scans)) as advance:

            def on_case(volume: Volume, prediction: np.ndarray, result: CaseResult) -> None:
                nonlocal drawn
                if drawn < self.config.evaluation.overlays:
                    pictures.draw_overlay(
                        volume, prediction, result, store.folder.labels,
                        self.config.data, self.folder.overlays / f"{result.scan}.png",
                    )  # fmt: skip
                    drawn += 1
                advance()

            results = evaluate_scans(
                Predictor(network, self.config, self.device),
                store,
                scans,
                surface_distance=self.config.evaluation.surface_distance,
                on_case=on_case,
            )
        self.folder.write_json(
            "metrics.json",
            {
                "summary": summarise(results),
                "weights": "ema" if self._averaged() else "last",
                "cases": [
                    {"scan": r.scan, "patient_id": r.patient_id, "dice": r.dice, "hd95": r.hd95}
                    for r in results
                ],
            },
        )
        return results
