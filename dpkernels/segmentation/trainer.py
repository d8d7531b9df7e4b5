"""The trainer: from a configuration to a run folder, and back from a run folder."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dpkernels.segmentation import pictures
from dpkernels.segmentation.config import SegmentationConfig, load_yaml
from dpkernels.segmentation.data import Augmentation, CaseStore, PatientDataset, split_patients
from dpkernels.segmentation.decathlon import DecathlonFolder, Scan, read_decathlon
from dpkernels.segmentation.evaluate import CaseResult, Predictor, evaluate_scans, summarise
from dpkernels.segmentation.logs import read_metrics
from dpkernels.segmentation.loop import TrainingLoop, rows_loss
from dpkernels.segmentation.loss import build_loss
from dpkernels.segmentation.model import (
    build_network,
    instantiate,
    resolve_device,
    select_trainable,
    total_stride,
)
from dpkernels.segmentation.phantom import write_phantom
from dpkernels.segmentation.predict import predict_path
from dpkernels.segmentation.privacy import (
    PrivacyPlan,
    check_patients_do_not_mix,
    plan_privacy,
)
from dpkernels.segmentation.progress import Display, SilentDisplay
from dpkernels.segmentation.report import PrivacyReport, build_report
from dpkernels.segmentation.run_folder import (
    RunFolder,
    environment,
    load_checkpoint,
    steps_begun,
)
from dpkernels.segmentation.volume import Volume


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run came to.

    Attributes:
        folder: the run folder.
        summary: per class: dice, dice_std, hd95, cases.
        epsilon: spent, at the configured delta; None without privacy.
        steps: steps counted.
    """

    folder: Path
    summary: dict[str, dict[str, float]]
    epsilon: float | None
    steps: int


class SegmentationTrainer:
    """Train, resume, evaluate and predict; the privacy unit is the patient.

    Args:
        config: what to run.
        out: run folder; default runs/<preset>-<date>-<time>.
        display: where progress goes; silent by default.

    Guarantees:
        With `privacy.enabled`, the weights after `fit` are differentially private for adding or
        removing one patient with all of their scans, at the epsilon of `privacy_report`. Losses,
        norms, pictures and metrics are by-products outside that guarantee; the report lists them.
    """

    def __init__(
        self,
        config: SegmentationConfig,
        out: str | Path | None = None,
        display: Display | None = None,
    ) -> None:
        self.config = config
        self.folder = RunFolder(out or default_run(config.preset))
        self.display = display or SilentDisplay()
        self.device = resolve_device(config.training.device)
        self._store: CaseStore | None = None
        self._split: dict[str, list[str]] = {}

    @classmethod
    def from_run(cls, out: str | Path, display: Display | None = None) -> SegmentationTrainer:
        """The trainer of an existing run, configured by its config.yaml.

        Raises:
            ValueError: `out` is not a run folder.
        """
        folder = RunFolder.open(out)
        return cls(SegmentationConfig.from_dict(load_yaml(folder.config)), out, display)

    def fit(self, *, resume: bool = False) -> TrainingResult:
        """Train, evaluate and write the run folder.

        Args:
            resume: continue the run in the folder; otherwise the folder must hold none.

        Raises:
            ValueError: a faulty configuration or data set (before training starts), a folder that
                holds a run, or a resume with other privacy parameters or nothing left to do.
            OSError: the run folder cannot be written; the last checkpoint stays whole.
        """
        if resume:
            self.folder = RunFolder.open(self.folder.root)
        else:
            self.folder = RunFolder.create(self.folder.root)
        store = self._open_store()
        network = self._build_network(store.folder)
        criterion = build_loss(self.config.loss, len(store.folder.labels))
        self._load_initial_weights(network)
        select_trainable(network, self.config.training.train_layers)
        self._split = split_patients(
            list(store.folder.patients), self.config.data, self.config.training.seed
        )
        plan = plan_privacy(self.config, len(self._split["train"]))
        checkpoint = self._resumed(plan) if resume else None
        self._read_scans(store)
        if not resume:
            self.folder.write_yaml("config.yaml", self.config.to_dict())
            self.folder.write_json("env.json", environment(self.device))
            self.folder.write_json("split.json", self._split)
            self.folder.write_json("plan.json", plan.to_dict())
            self.folder.write_json("data.json", _description(store))
        steps = self._train(network, criterion, store, plan, checkpoint)
        results = self._evaluate(store, self._split["test"])
        report = self._write_report(plan, steps)
        return TrainingResult(self.folder.root, summarise(results), report.epsilon, steps)

    def evaluate(self) -> list[CaseResult]:
        """Evaluate the run's weights on its held-out patients; writes metrics.json, overlays."""
        store = self._open_store()
        self._split = self.folder.read_json("split.json")
        return self._evaluate(store, self._split["test"])

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
        network = self._trained_network(len(data["labels"]), channels)
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

    def privacy_report(self) -> PrivacyReport:
        """The report of the run, for the steps counted so far; written to the run folder.

        Raises:
            ValueError: no step was taken yet.
        """
        plan = PrivacyPlan(**self.folder.read_json("plan.json"))
        return self._write_report(plan, steps_begun(self.folder.ledger))

    def _open_store(self) -> CaseStore:
        if self._store is None:
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
            self._store = CaseStore(folder, self.config.data, divisor)
        return self._store

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

    def _read_scans(self, store: CaseStore) -> None:
        scans = len(store.folder.scans)
        with self.display.counting("Reading and checking scans", scans) as advance:
            store.read_all(advance)

    def _build_network(self, folder: DecathlonFolder) -> nn.Module:
        return build_network(
            self.config.network,
            in_channels=len(folder.modalities),
            out_channels=len(folder.labels),
            seed=self.config.training.seed,
        ).to(self.device)

    def _load_initial_weights(self, network: nn.Module) -> None:
        path = self.config.training.init_from
        if not path:
            return
        state = load_checkpoint(path)
        try:
            network.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(f"training.init_from: {path} is of another network: {error}") from None

    def _resumed(self, plan: PrivacyPlan) -> dict[str, Any] | None:
        differences = plan.differences(self.folder.read_json("plan.json"))
        if self.folder.read_json("split.json") != self._split:
            differences.append("the split of the patients")
        if differences:
            raise ValueError(
                "--resume: a privacy parameter of the run has changed, which its guarantee does "
                "not cover. Start a new run. Changed: " + "; ".join(differences)
            )
        if self.folder.metrics_json.exists():
            raise ValueError(
                f"--resume: {self.folder.root} is finished, all {plan.steps} planned steps are "
                "taken; more would exceed the budget. Start a new run (training.init_from can "
                "start from its weights, but then the budgets add up)"
            )
        return self.folder.load_checkpoint() if self.folder.last.exists() else None

    def _train(
        self,
        network: nn.Module,
        criterion: nn.Module,
        store: CaseStore,
        plan: PrivacyPlan,
        checkpoint: dict[str, Any] | None,
    ) -> int:
        training = self.config.training
        dataset = PatientDataset(self._split["train"], store, self._augmentation(), training.seed)
        if plan.enabled:
            check_patients_do_not_mix(network.train(), criterion, dataset, self.device)
        loop = TrainingLoop(training, plan, self.folder, network, dataset)
        if checkpoint is not None:
            loop.load_state_dict(checkpoint)

        def validate() -> float | None:
            scans = _scans_of(store.folder, self._split["validation"])
            with loop.average.applied_to(network):
                predictor = Predictor(network, self.config, self.device)
                results = evaluate_scans(predictor, store, scans, surface_distance=False)
            return next(iter(summarise(results).values()))["dice"] if results else None

        counted = loop.run(
            rows_loss(criterion, self.device, training.precision), validate, self.display
        )
        pictures.draw_progress(
            read_metrics(self.folder.metrics_csv), plan, self.folder.root / "progress.png"
        )
        return counted

    def _augmentation(self) -> Augmentation | None:
        blocks = self.config.data.augmentations
        if not blocks:
            return None
        from monai.transforms import Compose

        return Compose([instantiate(b, f"data.augmentations[{i}]") for i, b in enumerate(blocks)])

    def _trained_network(self, classes: int, channels: int) -> nn.Module:
        ema = self.folder.checkpoints / "ema.pt"
        state = load_checkpoint(ema) if ema.exists() else self.folder.load_checkpoint()
        network = build_network(
            self.config.network, in_channels=channels, out_channels=classes, seed=0
        )
        network.load_state_dict(state["model"])
        return network.to(self.device)

    def _evaluate(self, store: CaseStore, patients: list[str]) -> list[CaseResult]:
        scans = _scans_of(store.folder, patients)
        network = self._trained_network(len(store.folder.labels), len(store.folder.modalities))
        shutil.rmtree(self.folder.overlays, ignore_errors=True)
        self.folder.overlays.mkdir()
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
                "weights": "ema" if (self.folder.checkpoints / "ema.pt").exists() else "last",
                "cases": [
                    {"scan": r.scan, "patient_id": r.patient_id, "dice": r.dice, "hd95": r.hd95}
                    for r in results
                ],
            },
        )
        return results

    def _write_report(self, plan: PrivacyPlan, steps: int) -> PrivacyReport:
        if not steps:
            raise ValueError(f"{self.folder.root}: no step was taken yet, nothing to report")
        columns = read_metrics(self.folder.metrics_csv)
        data = self.folder.read_json("data.json")
        report = build_report(
            self.config, plan, steps, columns, data["notes"], math.prod(data["view"])
        )
        self.folder.write_json("privacy_report.json", report.to_dict())
        self.folder.write_text("privacy_report.md", report.to_markdown())
        return report


def default_run(preset: str) -> Path:
    """runs/<preset>-<date>-<time>."""
    return Path("runs") / f"{preset or 'segment'}-{datetime.now():%Y%m%d-%H%M%S}"


def _description(store: CaseStore) -> dict[str, Any]:
    """What must be known of the data to predict and to report without it."""
    folder = store.folder
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


def _scans_of(folder: DecathlonFolder, patients: list[str]) -> list[Scan]:
    return [scan for patient in patients for scan in folder.patients[patient]]
