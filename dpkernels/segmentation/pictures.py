"""Held-out cases with truth and prediction."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from dpkernels.segmentation.config import DataConfig
from dpkernels.segmentation.evaluate import CaseResult
from dpkernels.segmentation.volume import Volume
from dpkernels.training.curves import COLOURS, save_figure

#: name, normal, and the patient's side at the left and at the right edge: seen from the feet, from
#: the front, and from the patient's left, as radiologists do
_PLANES = (
    ("axial", 2, "R", "L"),
    ("coronal", 1, "R", "L"),
    ("sagittal", 0, "A", "P"),
)


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
    nothing = np.zeros_like(prediction)
    columns = (("scan", nothing), ("truth", volume.truth), ("prediction", prediction))
    figure, axes = plt.subplots(3, 3, figsize=(8.4, 8.6), facecolor="black")
    for row, (plane, normal, left, right) in zip(axes, _PLANES, strict=True):
        index = _most_labelled_slice(volume.truth, prediction, normal)
        grey = np.clip((volume.image[0] - low) / (high - low), 0, 1).take(index, axis=normal)
        across, up = (volume.spacing[a] for a in range(3) if a != normal)
        for axis, (title, mask) in zip(row, columns, strict=True):
            section = mask.take(index, axis=normal)
            picture = _tinted(np.repeat(grey[..., None], 3, axis=-1), section)
            axis.imshow(
                picture.swapaxes(0, 1), origin="lower", aspect=up / across, interpolation="nearest"
            )
            axis.invert_xaxis()  # in RAS the patient's right and front are at the high end
            _outline(axis, section)
            axis.set_axis_off()
            if normal == 2:
                axis.set_title(title, color="white", fontsize=12)
        for place, side in ((0.02, left), (0.94, right)):
            row[0].text(place, 0.5, side, color="white", fontsize=9, transform=row[0].transAxes)
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
    save_figure(figure, path, tight=False)


def _most_labelled_slice(label: np.ndarray, prediction: np.ndarray, normal: int) -> int:
    mask = label > 0 if (label > 0).any() else prediction > 0
    area = mask.sum(axis=tuple(a for a in range(3) if a != normal))
    return int(area.argmax()) if area.any() else label.shape[normal] // 2


def _colour(value: int) -> tuple[float, float, float]:
    return to_rgb(COLOURS[(value - 1) % len(COLOURS)])


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
