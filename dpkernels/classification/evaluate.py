"""Predictions on held-out images, and how good they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import nn

from dpkernels.training.targets import evaluating

_ROWS = 64


@dataclass(frozen=True)
class ImageResult:
    """One image: truth and prediction are labels, `probabilities` [classes] sum to 1."""

    image: str
    patient_id: str
    truth: int
    predicted: int
    probabilities: tuple[float, ...]


def predict_rows(
    network: nn.Module, images: Iterable[torch.Tensor], device: torch.device
) -> Iterator[tuple[float, ...]]:
    """Class probabilities of images [C, H, W], in evaluation mode."""
    remaining = iter(images)
    while block := list(islice(remaining, _ROWS)):
        with evaluating(network):
            scores = network(torch.stack(block).to(device)).float()
        yield from map(tuple, torch.softmax(scores, dim=1).cpu().tolist())


def confusion_matrix(truth: Sequence[int], predicted: Sequence[int], classes: int) -> np.ndarray:
    """[classes, classes], int64: row = truth, column = prediction."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (np.asarray(truth, int), np.asarray(predicted, int)), 1)
    return matrix


def matthews_correlation(confusion: np.ndarray) -> float:
    """Matthews' correlation coefficient for any number of classes; 0 where it is undefined.

    The correlation of truth and prediction as indicator vectors [Gorodkin 2004]: 1 for perfect, 0
    for guessing, also when one class is rare. Undefined (0/0) when only one class occurs or is
    predicted.

    Args:
        confusion: [classes, classes], counts.
    """
    counts = confusion.astype(float)
    total, right = counts.sum(), np.trace(counts)
    truth, predicted = counts.sum(axis=1), counts.sum(axis=0)
    spread = (total**2 - truth @ truth) * (total**2 - predicted @ predicted)
    return float((right * total - truth @ predicted) / math.sqrt(spread)) if spread else 0.0


def summarise(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Over all images: mcc, accuracy, balanced_accuracy; per class: recall (NaN: no image)."""
    images = confusion.sum(axis=1)
    recall = [
        float(confusion[i, i] / images[i]) if images[i] else math.nan for i in range(len(classes))
    ]
    summary: dict[str, dict[str, float]] = {
        "all": {
            "mcc": matthews_correlation(confusion),
            "accuracy": float(np.trace(confusion) / max(1, images.sum())),
            "balanced_accuracy": float(np.nanmean(recall)) if images.sum() else math.nan,
            "images": int(images.sum()),
        }
    }
    for name, value, count in zip(classes, recall, images, strict=True):
        summary[name] = {"recall": value, "images": int(count)}
    return summary
