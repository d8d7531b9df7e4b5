"""The trainer: a Decathlon folder and a configuration in, a run folder with its report out."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dpkernels.segmentation import pictures
from dpkernels.segmentation.config import SegmentationConfig
from dpkernels.segmentation.data import CaseStore, prepare
from dpkernels.segmentation.evaluate import CaseResult, Predictor, measure, summarise
from dpkernels.segmentation.layouts import read_scans
from dpkernels.segmentation.loss import build_loss
from dpkernels.segmentation.model import build_network, total_stride
from dpkernels.segmentation.phantom import write_phantom
from dpkernels.segmentation.scans import Scan, ScanFolder, scan_name
from dpkernels.segmentation.volume import check_headers, load_volume
from dpkernels.training.run_folder import atomic
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
            ValueError: no scan found, a faulty one, or label maps of these names in `target`.
        """
        paths, channels = _scans_at(Path(source)), len(self._known()["modalities"])
        scans = [Scan(scan_name(path), scan_name(path), path, None) for path in paths]
        folder = Path(target)
        if folder.resolve() == paths[0].parent.resolve():
            raise ValueError(f"OUT must be another folder than the images' ({folder})")
        files = [folder / f"{scan.name}.nii.gz" for scan in scans]
        for path in files:
            if path.exists() or files.count(path) > 1:
                raise ValueError(
                    f"OUT: {path} {'exists already' if path.exists() else 'would be written twice'}"
                    "; nothing is overwritten, choose another folder"
                )
        for scan in scans:
            check_headers(scan)
        predictor = Predictor(self._trained_network(), self.config, self.device)
        folder.mkdir(parents=True, exist_ok=True)
        with self.display.counting("Predicting", len(scans)) as advance:
            for scan, path in zip(scans, files, strict=True):
                volume = load_volume(scan, channels=channels)
                case = prepare(volume, self.config.data, total_stride(self.config.network))
                label = volume.to_native(predictor.segment(case, volume))
                with atomic(path) as partial:
                    partial.write_bytes(gzip.compress(label.to_bytes()))
                advance()
        return files

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
        predictor = Predictor(network, self.config, self.device)
        results: list[CaseResult] = []
        for scan in records:
            volume = store.volume(scan)
            prediction = predictor.segment(store.item(scan), volume)
            result = measure(
                scan,
                volume,
                prediction,
                store.folder.labels,
                surface_distance=final and evaluation.surface_distance,
            )
            if final and len(results) < evaluation.overlays:
                pictures.draw_overlay(
                    volume, prediction, result, store.folder.labels,
                    self.config.data, self.folder.overlays / f"{result.scan}.png",
                )  # fmt: skip
            results.append(result)
            on_progress()
        return results

    def _summary(self, results: Sequence[CaseResult]) -> Summary:
        return summarise(results)

    def _utility(self, summary: Summary) -> float:
        """Dice of the first class: the organ, where the others are lesions in it."""
        return next(iter(summary.values()))["dice"]


def _scans_at(source: Path) -> list[Path]:
    if source.is_file():
        scan_name(source)
        return [source]
    if not source.is_dir():
        raise ValueError(f"IN must be a NIfTI file or a folder of them; {source} does not exist")
    paths = sorted(p for p in source.glob("*.nii*") if not p.name.startswith("._"))
    if not paths:
        raise ValueError(f"IN must hold .nii.gz or .nii files; {source} has none")
    return paths
