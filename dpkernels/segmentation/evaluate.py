"""Sliding-window prediction and per-case metrics, both on the native grid of each file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from scipy.ndimage import binary_erosion, distance_transform_edt
from torch import nn

from dpkernels.segmentation.config import SegmentationConfig
from dpkernels.segmentation.data import Case, restore
from dpkernels.segmentation.model import head_outputs
from dpkernels.segmentation.scans import Scan
from dpkernels.segmentation.volume import Volume
from dpkernels.training.targets import evaluating


@dataclass(frozen=True)
class CaseResult:
    """Metrics of one scan.

    Attributes:
        scan: its name.
        patient_id: its patient.
        dice: class name to Dice; NaN where neither truth nor prediction has the class.
        hd95: class name to the 95th percentile Hausdorff distance in millimetres; NaN where truth
            or prediction lacks the class, or when it was not asked for.
    """

    scan: str
    patient_id: str
    dice: dict[str, float]
    hd95: dict[str, float]


@dataclass(frozen=True)
class Predictor:
    """A network in evaluation mode, applied by sliding window."""

    network: nn.Module
    config: SegmentationConfig
    device: torch.device

    def logits(self, case: Case) -> torch.Tensor:
        """Class scores [C, X, Y, Z] on the prepared grid, on the CPU."""
        window = self.config.data.crop or tuple(case.image.shape[1:])
        with evaluating(self.network):
            scores = sliding_window_inference(
                case.image[None].to(self.device),
                roi_size=window,
                sw_batch_size=4,
                predictor=lambda window: head_outputs(self.network(window))[0],
                overlap=self.config.evaluation.overlap,
                mode="gaussian",
            )
        return scores[0].float().cpu()

    def segment(self, case: Case, volume: Volume) -> np.ndarray:
        """Class indices [X, Y, Z], uint8, on the scan's own voxels in RAS order."""
        return restore(self.logits(case), case, volume).numpy()


def measure(
    scan: Scan,
    volume: Volume,
    prediction: np.ndarray,
    labels: Mapping[int, str],
    *,
    surface_distance: bool,
) -> CaseResult:
    """Compare a prediction with the truth, class by class.

    Args:
        scan: whose prediction it is.
        volume: the scan, with its label.
        prediction: [X, Y, Z], class indices in RAS order.
        labels: value to name, background included.
        surface_distance: also compute hd95.
    """
    result = CaseResult(scan.name, scan.patient_id, {}, {})
    for value, name in labels.items():
        if value == 0:
            continue
        truth, predicted = volume.truth == value, prediction == value
        result.dice[name] = dice_score(predicted, truth)
        distance = hausdorff_95(predicted, truth, volume.spacing) if surface_distance else math.nan
        result.hd95[name] = distance
    return result


def dice_score(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two masks; NaN when both are empty."""
    size = int(prediction.sum()) + int(truth.sum())
    return 2.0 * int((prediction & truth).sum()) / size if size else math.nan


def hausdorff_95(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> float:
    """The larger of both directed 95th percentiles of surface distance, millimetres.

    NaN when a mask is empty.
    """
    if not prediction.any() or not truth.any():
        return math.nan
    inside = np.argwhere(prediction | truth)
    box = tuple(
        slice(low, high + 1) for low, high in zip(inside.min(0), inside.max(0), strict=True)
    )
    masks = [np.pad(mask[box], 1) for mask in (prediction, truth)]
    surfaces = [mask & ~binary_erosion(mask) for mask in masks]
    directed = [
        np.percentile(distance_transform_edt(~there, sampling=spacing)[here], 95)
        for here, there in (surfaces, surfaces[::-1])
    ]
    return float(max(directed))


def summarise(results: Sequence[CaseResult]) -> dict[str, dict[str, float]]:
    """Per class: mean and spread of Dice, mean hd95, and how many cases count (NaN-safe)."""
    summary = {}
    for name in results[0].dice if results else ():
        dice = [r.dice[name] for r in results if math.isfinite(r.dice[name])]
        hd95 = [r.hd95[name] for r in results if math.isfinite(r.hd95[name])]
        summary[name] = {
            "dice": fmean(dice) if dice else math.nan,
            "dice_std": float(np.std(dice)) if dice else math.nan,
            "hd95": fmean(hd95) if hd95 else math.nan,
            "cases": len(dice),
        }
    return summary
