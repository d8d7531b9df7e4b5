"""The trainer: a Decathlon folder and a configuration in, a run folder with its report out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dpkernels.segmentation import pictures
from dpkernels.segmentation.config import SegmentationConfig
from dpkernels.segmentation.data import CaseStore
from dpkernels.segmentation.evaluate import CaseResult, Predictor, evaluate_scans, summarise
from dpkernels.segmentation.layouts import read_scans
from dpkernels.segmentation.loss import build_loss
from dpkernels.segmentation.model import build_network, total_stride
from dpkernels.segmentation.phantom import write_phantom
from dpkernels.segmentation.predict import predict_path
from dpkernels.segmentation.scans import Scan, ScanFolder
from dpkernels.segmentation.volume import Volume
from dpkernels.training.trainer import Trainer
from dpkernels.training.trainer_base import Summary


class SegmentationTrainer(Trainer[SegmentationConfig, CaseStore, CaseResult]):
    """Train, resume, evaluate and predict on 3D scans; the privacy unit is the patient.

    See `dpkernels.training.trainer.Trainer` for the arguments, `fit`, `from_run`,
    `privacy_report` and the guarantee.
    """

    config_class = SegmentationConfig
    metric = "Dice"

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
        return predict_path(
            Predictor(self._trained_network(), self.config, self.device),
            self.config.data,
            Path(source),
            Path(target),
            channels=len(self._known()["modalities"]),
            divisor=total_stride(self.config.network),
            display=self.display,
        )

    def _open(self) -> CaseStore:
        data = self.config.data
        root = data.root or self._embedded("phantom", data.phantom, write_phantom)
        folder = read_scans(root, data.patients_csv)
        if data.intensity == "window" and set(folder.modalities) != {"CT"}:
            raise ValueError(
                f"data.intensity: a Hounsfield window fits CT only, but dataset.json lists "
                f"{', '.join(folder.modalities)}; use data.intensity=zscore"
            )
        divisor = total_stride(self.config.network)
        if data.crop is not None and any(size % divisor for size in data.crop):
            raise ValueError(
                f"data.crop must be multiples of {divisor}, the network's total stride; got "
                f"{list(data.crop)}"
            )
        return CaseStore(folder, data, divisor)

    def _facts(self, folder: ScanFolder) -> dict[str, Any]:
        return {"labels": folder.labels, "modalities": list(folder.modalities)}

    def _by_products(self) -> Sequence[str]:
        if self.config.data.intensity != "zscore":
            return ()
        return [
            "Intensities are normalised by each scan's own mean and deviation; no statistic "
            "crosses patients."
        ]

    def _build_network(self, seed: int) -> nn.Module:
        known = self._known()
        return build_network(
            self.config.network,
            in_channels=len(known["modalities"]),
            out_channels=len(known["labels"]),
            seed=seed,
        )

    def _build_criterion(self) -> nn.Module:
        return build_loss(self.config.loss, len(self._known()["labels"]))

    def _measure(
        self,
        network: nn.Module,
        records: Sequence[Scan],
        on_progress: Callable[[], None],
        *,
        final: bool,
    ) -> list[CaseResult]:
        store, evaluation = self._store(), self.config.evaluation
        drawn = 0 if final else evaluation.overlays

        def on_case(volume: Volume, prediction: np.ndarray, result: CaseResult) -> None:
            nonlocal drawn
            if drawn < evaluation.overlays:
                pictures.draw_overlay(
                    volume, prediction, result, store.folder.labels,
                    self.config.data, self.folder.overlays / f"{result.scan}.png",
                )  # fmt: skip
                drawn += 1
            on_progress()

        return evaluate_scans(
            Predictor(network, self.config, self.device),
            store,
            records,
            surface_distance=final and evaluation.surface_distance,
            on_case=on_case,
        )

    def _summary(self, results: Sequence[CaseResult]) -> Summary:
        return summarise(results)

    def _utility(self, summary: Summary) -> float:
        """Dice of the first class: the organ, where the others are lesions in it."""
        return next(iter(summary.values()))["dice"]
