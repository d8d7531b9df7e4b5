"""Held-out images with truth and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from dpkernels.classification.evaluate import ImageResult
from dpkernels.training.curves import COLOURS, save_figure

_COLUMNS, _ROWS = 8, 3
SHOWN = _COLUMNS * _ROWS


def draw_predictions(
    images: Sequence[torch.Tensor],
    results: Sequence[ImageResult],
    classes: Sequence[str],
    path: Path,
) -> None:
    """A grid of images, right predictions in one colour and wrong ones in another.

    Args:
        images: [C, H, W] in [0, 1], at most `SHOWN`.
        results: of the same images.
        classes: names by label.
        path: of the PNG.
    """
    figure, axes = plt.subplots(_ROWS, _COLUMNS, figsize=(1.7 * _COLUMNS, 2.0 * _ROWS))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, result in zip(axes.flat, images, results, strict=False):
        pixels = image.permute(1, 2, 0).numpy()
        axis.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=1)
        right = result.truth == result.predicted
        text = classes[result.predicted]
        axis.set_title(
            text if right else f"{text}\nis {classes[result.truth]}",
            color=COLOURS[0] if right else COLOURS[1],
            fontsize=8,
        )
    save_figure(figure, path)
