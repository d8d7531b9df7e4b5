"""The training curves of a run, and the look of every picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter1d

from dpkernels.training.privacy import PrivacyPlan

COLOURS = ("#2a9d8f", "#e76f51", "#e9c46a", "#8e7cc3", "#4f8fd0", "#d46a9f", "#7aa95c")
_INK, _FAINT = "#22303c", "#c7d0d8"


def draw_progress(
    columns: dict[str, list[float]], plan: PrivacyPlan, metric: str, path: Path
) -> None:
    """Loss, epsilon and clipped share over the steps, as a PNG.

    Args:
        columns: of metrics.csv.
        plan: privacy of the run.
        metric: name of the validation score.
        path: of the picture.
    """
    steps = np.asarray(columns["step"])
    panels = [("loss", "Loss", COLOURS[0])]
    if plan.enabled:
        panels += [
            ("epsilon", f"Epsilon spent (delta {plan.delta:g})", COLOURS[1]),
            ("clipped_fraction", f"Share of {plan.unit}s clipped", COLOURS[3]),
        ]
    if np.isfinite(columns["validation"]).any():
        panels.append(("validation", f"Validation {metric}", COLOURS[4]))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
    for axis, (column, title, colour) in zip(axes[0], panels, strict=True):
        values = np.asarray(columns[column])
        known = np.isfinite(values)
        sparse = column in ("epsilon", "validation")
        axis.plot(
            steps[known], values[known], color=colour, lw=1.8 if sparse else 0.7,
            alpha=1.0 if sparse else 0.45, marker="o" if known.sum() < 20 else None, ms=3,
        )  # fmt: skip
        if not sparse and known.sum() > 4:
            width = max(3, known.sum() // 15) | 1
            mean = uniform_filter1d(values[known], width, mode="nearest")
            axis.plot(steps[known], mean, color=colour, lw=2)
        axis.set_title(title, fontsize=10, color=_INK, loc="left")
        axis.set_xlabel("step", fontsize=9, color=_INK)
        axis.set_xlim(0, plan.steps)
        axis.set_ylim(0, 1.05 if column in ("clipped_fraction", "validation") else None)
        axis.grid(color=_FAINT, lw=0.5, alpha=0.6)
        axis.tick_params(labelsize=8, colors=_INK)
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path, *, tight: bool = True) -> None:
    """Write a figure as a PNG and close it."""
    if tight:
        figure.tight_layout()
    figure.savefig(path, dpi=110, facecolor=figure.get_facecolor())
    plt.close(figure)
