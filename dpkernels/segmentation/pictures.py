"""Pictures of a run: the training curves, and held-out cases with truth and prediction."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dpkernels.segmentation.config import DataConfig
from dpkernels.segmentation.evaluate import CaseResult
from dpkernels.segmentation.privacy import PrivacyPlan
from dpkernels.segmentation.volume import Volume

_COLOURS = ("#2a9d8f", "#e76f51", "#e9c46a", "#8e7cc3", "#4f8fd0", "#d46a9f", "#7aa95c")
_INK, _FAINT = "#22303c", "#c7d0d8"
_PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))


def draw_progress(columns: dict[str, list[float]], plan: PrivacyPlan, path: Path) -> None:
    """Loss, epsilon and clipped share over the steps, as a PNG.

    Args:
        columns: of metrics.csv.
        plan: privacy of the run.
        path: of the picture.
    """
    steps = np.asarray(columns["step"])
    panels = [("loss", "Loss", _COLOURS[0])]
    if plan.enabled:
        panels += [
            ("epsilon", f"Epsilon spent (delta {plan.delta:g})", _COLOURS[1]),
            ("clipped_fraction", "Share of patients clipped", _COLOURS[3]),
        ]
    if np.isfinite(columns["validation_dice"]).any():
        panels.append(("validation_dice", "Validation Dice", _COLOURS[4]))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
    for axis, (column, title, colour) in zip(axes[0], panels, strict=True):
        values = np.asarray(columns[column])
        known = np.isfinite(values)
        sparse = column in ("epsilon", "validation_dice")
        axis.plot(
            steps[known], values[known], color=colour, lw=1.8 if sparse else 0.7,
            alpha=1.0 if sparse else 0.45, marker="o" if known.sum() < 20 else None, ms=3,
        )  # fmt: skip
        if not sparse and known.sum() > 4:
            axis.plot(steps[known], _running_mean(values[known]), color=colour, lw=2)
        axis.set_title(title, fontsize=10, color=_INK, loc="left")
        axis.set_xlabel("step", fontsize=9, color=_INK)
        axis.set_xlim(0, plan.steps)
        top = 1.05 if column in ("clipped_fraction", "validation_dice") else None
        axis.set_ylim(0, top)
        axis.grid(color=_FAINT, lw=0.5, alpha=0.6)
        axis.tick_params(labelsize=8, colors=_INK)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    _save(figure, path)


def draw_overlay(
    volume: Volume,
    prediction: np.ndarray,
    result: CaseResult,
    labels: dict[int, str],
    config: DataConfig,
    path: Path,
) -> None:
    """One case in three planes: the scan, the truth on it, the prediction on it.

    Args:
        volume: the scan, with its label.
        prediction: [X, Y, Z], class indices in RAS order.
        result: its metrics, for the title.
        labels: value to name.
        config: for the intensity window.
        path: of the picture.
    """
    low, high = (
        config.window if config.intensity == "window" else np.percentile(volume.image[0], (1, 99))
    )
    columns = (("scan", None), ("truth", volume.truth), ("prediction", prediction))
    figure, axes = plt.subplots(3, 3, figsize=(8.4, 8.6), facecolor="black")
    for row, (plane, normal) in zip(axes, _PLANES, strict=True):
        index = _most_labelled_slice(volume.truth, prediction, normal)
        grey = np.clip((volume.image[0] - low) / (high - low), 0, 1).take(index, axis=normal)
        across, up = (volume.spacing[a] for a in range(3) if a != normal)
        for axis, (title, mask) in zip(row, columns, strict=True):
            picture = np.repeat(grey[..., None], 3, axis=-1)
            section = None if mask is None else mask.take(index, axis=normal)
            if section is not None:
                picture = _tinted(picture, section)
            # Seen from the feet and from the front: the patient's right is on the left.
            axis.imshow(
                picture.swapaxes(0, 1), origin="lower", aspect=up / across, interpolation="nearest"
            )
            if section is not None:
                _outline(axis, section)
            axis.set_axis_off()
            if normal == 2:
                axis.set_title(title, color="white", fontsize=12)
        row[0].text(
            0.02, 0.03, plane, color="white", fontsize=9, transform=row[0].transAxes, va="bottom"
        )
    names = [labels[value] for value in labels if value]
    scores = "   ".join(
        f"{name}: Dice {result.dice[name]:.2f}" if math.isfinite(result.dice[name])
        else f"{name}: absent"
        for name in names
    )  # fmt: skip
    figure.suptitle(f"{result.scan}   {scores}", color="white", fontsize=13, y=0.985)
    figure.legend(
        handles=[Patch(color=_colour(v), label=labels[v]) for v in labels if v],
        loc="lower center", ncol=len(names), frameon=False, labelcolor="white", fontsize=10,
    )  # fmt: skip
    figure.subplots_adjust(left=0.01, right=0.99, top=0.93, bottom=0.05, wspace=0.02, hspace=0.03)
    _save(figure, path, tight=False)


def _most_labelled_slice(label: np.ndarray, prediction: np.ndarray, normal: int) -> int:
    mask = label > 0 if (label > 0).any() else prediction > 0
    area = mask.sum(axis=tuple(a for a in range(3) if a != normal))
    return int(area.argmax()) if area.any() else label.shape[normal] // 2


def _colour(value: int) -> tuple[float, float, float]:
    return to_rgb(_COLOURS[(value - 1) % len(_COLOURS)])


def _tinted(picture: np.ndarray, section: np.ndarray, share: float = 0.4) -> np.ndarray:
    for value in np.unique(section[section > 0]):
        inside = section == value
        picture[inside] = (1 - share) * picture[inside] + share * np.asarray(_colour(int(value)))
    return picture


def _outline(axis: Axes, section: np.ndarray) -> None:
    for value in np.unique(section[section > 0]):
        axis.contour(
            (section == value).T.astype(float), levels=[0.5], colors=[_colour(int(value))],
            linewidths=1.4,
        )  # fmt: skip


def _running_mean(values: np.ndarray) -> np.ndarray:
    width = max(3, len(values) // 15) | 1
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _save(figure: Figure, path: Path, *, tight: bool = True) -> None:
    if tight:
        figure.tight_layout()
    figure.savefig(path, dpi=110, facecolor=figure.get_facecolor())
    plt.close(figure)
