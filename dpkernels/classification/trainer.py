"""The trainer: a folder of images and a configuration in, a run folder with its report out."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dpkernels.classification import pictures
from dpkernels.classification.config import ClassificationConfig
from dpkernels.classification.data import ImageStore, load_picture
from dpkernels.classification.evaluate import (
    ImageResult,
    confusion_matrix,
    predict_rows,
    summarise,
)
from dpkernels.classification.folders import ImageFolder, Picture, read_images, single_pictures
from dpkernels.classification.synthetic import write_synthetic
from dpkernels.training.criteria import class_criterion
from dpkernels.training.run_folder import atomic
from dpkernels.training.targets import build_model
from dpkernels.training.trainer import Trainer
from dpkernels.training.trainer_base import Summary


class ClassificationTrainer(Trainer[ClassificationConfig, ImageStore, ImageResult]):
    """Train, resume, evaluate and predict on images; the privacy unit is who they show.

    See `dpkernels.training.trainer.Trainer` for the arguments, `fit`, `from_run`,
    `privacy_report` and the guarantee.
    """

    config_class = ClassificationConfig
    metric = "MCC"

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

    def _open(self) -> ImageStore:
        data = self.config.data
        folder = read_images(
            data.root or self._embedded("synthetic", data.synthetic, write_synthetic),
            layout=data.layout,
            positive=data.positive,
            patients_csv=data.patients_csv,
        )
        return ImageStore(folder, data)

    def _facts(self, folder: ImageFolder) -> dict[str, Any]:
        return {"classes": list(folder.classes)}

    def _by_products(self) -> Sequence[str]:
        return ["The names of the classes, and that each of them occurs, are treated as public."]

    def _classes(self) -> list[str]:
        """Names by label."""
        return self._known()["classes"]

    def _build_network(self, seed: int) -> nn.Module:
        wanted = {"in_channels": self.config.data.channels, "out_channels": len(self._classes())}
        return build_model(self.config.network, wanted, "the data set", seed)

    def _build_criterion(self) -> nn.Module:
        return class_criterion(self.config.loss, len(self._classes()))

    def _measure(
        self,
        network: nn.Module,
        records: Sequence[Picture],
        on_progress: Callable[[], None],
        *,
        final: bool,
    ) -> list[ImageResult]:
        store, results = self._store(), []
        rows = predict_rows(network, map(store.image, records), self.device)
        for picture, probabilities in zip(records, rows, strict=True):
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            results.append(
                ImageResult(picture.name, picture.patient_id, picture.label, best, probabilities)
            )
            on_progress()
        if final:
            shown = [store.image(picture) for picture in records[: pictures.SHOWN]]
            path = self.folder.overlays / "predictions.png"
            pictures.draw_predictions(shown, results, self._classes(), path)
        return results

    def _summary(self, results: Sequence[ImageResult]) -> Summary:
        classes = self._classes()
        confusion = confusion_matrix(
            [r.truth for r in results], [r.predicted for r in results], len(classes)
        )
        return summarise(confusion, classes)

    def _utility(self, summary: Summary) -> float:
        return summary["all"]["mcc"]
