"""The trainer: a folder of images and a configuration in, a run folder with its report out."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpkernels.classification import pictures
from dpkernels.classification.config import ClassificationConfig
from dpkernels.classification.data import ImageStore, PatientImages, load_picture
from dpkernels.classification.evaluate import (
    ImageResult,
    confusion_matrix,
    predict_rows,
    summarise,
)
from dpkernels.classification.folders import Picture, read_images, single_pictures
from dpkernels.classification.synthetic import write_synthetic
from dpkernels.training.augment import build_augmentation
from dpkernels.training.criteria import check_decomposable
from dpkernels.training.reading import split_patients
from dpkernels.training.run_folder import atomic
from dpkernels.training.targets import build_model, instantiate
from dpkernels.training.trainer import Trainer


class ClassificationTrainer(Trainer[ClassificationConfig]):
    """Train, resume, evaluate and predict on images; the privacy unit is who they show.

    See `dpkernels.training.trainer.Trainer` for the arguments, `fit`, `from_run`,
    `privacy_report` and the guarantee.
    """

    config_class = ClassificationConfig
    metric = "MCC"

    _opened: ImageStore | None = None

    def evaluate(self) -> list[ImageResult]:
        """Evaluate the run's weights on its held-out patients; writes metrics.json, overlays."""
        self.folder.check_writable()
        self._split = self.folder.read_json("split.json")
        return self._evaluate_images()

    def predict(self, source: str | Path, target: str | Path) -> list[str]:
        """Classify an image, or every one in a folder.

        Args:
            source: file or folder.
            target: CSV to write: image, class, and the probability of every class.

        Returns:
            The names of the images.

        Raises:
            ValueError: no image found, a faulty one, or a file at `target`.
        """
        if Path(target).exists():
            raise ValueError(
                f"OUT: {target} exists already; nothing is overwritten, choose another file"
            )
        found = single_pictures(Path(source))
        data, classes = self.config.data, self._classes()
        images = (load_picture(str(p.path), data.size, data.channels).float() / 255 for p in found)
        rows = predict_rows(self._trained_network(), images, self.device)
        with atomic(Path(target)) as path, path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "class", *classes])
            for picture, probabilities in zip(found, rows, strict=True):
                best = max(range(len(classes)), key=probabilities.__getitem__)
                writer.writerow(
                    [picture.name, classes[best], *(f"{value:.4f}" for value in probabilities)]
                )
        return [picture.name for picture in found]

    def _open_store(self) -> ImageStore:
        if self._opened is None:
            data = self.config.data
            folder = read_images(
                data.root or self._synthetic_folder(),
                layout=data.layout,
                positive=data.positive,
                patients_csv=data.patients_csv,
            )
            self._opened = ImageStore(folder, data)
        return self._opened

    def _synthetic_folder(self) -> Path:
        made = self.config.data.synthetic
        name = f"synthetic-{made.lesions}x{made.size}-seed{made.seed}"
        with self.display.counting("Drawing synthetic lesions", made.lesions) as advance:
            return write_synthetic(
                self.folder.root.parent / name,
                lesions=made.lesions,
                size=made.size,
                seed=made.seed,
                on_progress=advance,
            )

    def _open_data(self) -> None:
        self._open_store()

    def _read_data(self) -> None:
        store = self._open_store()
        count = len(store.folder.pictures)
        with self.display.counting("Reading and checking images", count) as advance:
            store.read_all(advance)

    def _unit(self) -> str:
        return self._open_store().folder.unit

    def _split_patients(self) -> dict[str, list[str]]:
        data = self.config.data
        return split_patients(
            list(self._open_store().folder.patients),
            data.test_share,
            data.validation_share,
            self.config.training.seed,
        )

    def _description(self) -> dict[str, Any]:
        folder, data = self._open_store().folder, self.config.data
        return {
            "root": str(folder.root),
            "classes": list(folder.classes),
            "view": [data.channels, data.size, data.size],
            "unit": folder.unit,
            "patients": len(folder.patients),
            "images": len(folder.pictures),
            "notes": list(folder.notes),
        }

    def _by_products(self) -> Sequence[str]:
        texts = ["The names of the classes, and that each of them occurs, are treated as public."]
        if self.config.data.validation_share:
            texts.append("The validation curve shows validation images; it steers nothing here.")
        return texts

    def _classes(self) -> list[str]:
        """Names by label: from the run folder once it is written."""
        if self._opened is None and (self.folder.root / "data.json").exists():
            return self.folder.read_json("data.json")["classes"]
        return list(self._open_store().folder.classes)

    def _build_network(self, seed: int) -> nn.Module:
        wanted = {"in_channels": self.config.data.channels, "out_channels": len(self._classes())}
        return build_model(self.config.network, wanted, "the data set", seed)

    def _build_criterion(self) -> nn.Module:
        criterion = instantiate(self.config.loss, "loss")
        classes = len(self._classes())
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(2 * classes, classes, generator=generator)
        labels = torch.arange(2 * classes) % classes
        check_decomposable(criterion, scores, labels, self.config.loss)
        return criterion

    def _training_set(self) -> PatientImages:
        augment = build_augmentation(self.config.data.augmentations)
        return PatientImages(
            self._split["train"], self._open_store(), augment, self.config.training.seed
        )

    def _validate(self, network: nn.Module) -> float | None:
        results = self._predicted(network, self._pictures_of("validation"))
        return self._utility(self._summary(results)) if results else None

    def _evaluate(self) -> dict[str, dict[str, float]]:
        return self._summary(self._evaluate_images())

    def _utility(self, summary: dict[str, dict[str, float]]) -> float:
        return summary["all"]["mcc"]

    def _summary(self, results: Sequence[ImageResult]) -> dict[str, dict[str, float]]:
        classes = self._classes()
        confusion = confusion_matrix(
            [r.truth for r in results], [r.predicted for r in results], len(classes)
        )
        return summarise(confusion, classes)

    def _evaluate_images(self) -> list[ImageResult]:
        store, found = self._open_store(), self._pictures_of("test")
        with self.display.counting("Evaluating held-out images", len(found)) as advance:
            results = self._predicted(self._trained_network(), found, advance)
        self.folder.clear_overlays()
        shown = [store.image(picture) for picture in found[: pictures.SHOWN]]
        pictures.draw_predictions(
            shown, results, self._classes(), self.folder.overlays / "predictions.png"
        )
        self.folder.write_json(
            "metrics.json",
            {
                "summary": self._summary(results),
                "weights": "ema" if self._averaged() else "last",
                "cases": [
                    {
                        "image": r.image,
                        "patient_id": r.patient_id,
                        "truth": r.truth,
                        "predicted": r.predicted,
                        "probabilities": r.probabilities,
                    }
                    for r in results
                ],
            },
        )
        return results

    def _predicted(
        self,
        network: nn.Module,
        found: Sequence[Picture],
        on_progress: Callable[[], None] = lambda: None,
    ) -> list[ImageResult]:
        store = self._open_store()
        rows = predict_rows(network, map(store.image, found), self.device)
        results = []
        for picture, probabilities in zip(found, rows, strict=True):
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            results.append(
                ImageResult(picture.name, picture.patient_id, picture.label, best, probabilities)
            )
            on_progress()
        return results

    def _pictures_of(self, part: str) -> list[Picture]:
        groups = self._open_store().folder.patients
        return [picture for patient in self._split[part] for picture in groups[patient]]
