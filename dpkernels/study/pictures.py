"""Reconstructions side by side, and the curves of privacy, utility and risk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from dpkernels.study.campaign import ADVERSARIES, AttackResult
from dpkernels.study.results import Row, budget
from dpkernels.training.curves import COLOURS, save_figure
from dpkernels.training.run_folder import atomic
from dpkernels.training.trainer import Exposed

_MOST_PATIENTS = 4


def section(image: np.ndarray) -> np.ndarray:
    """What is shown of a record: [H, W] or, for three channels, [H, W, 3].

    Args:
        image: [C, H, W], or [C, X, Y, Z] in RAS order, of which the middle slice along Z is shown
            as radiologists do: the patient's front up, their right on the left.
    """
    if image.ndim == 4:
        return np.asarray(image[0, :, :, image.shape[-1] // 2].T[::-1, ::-1])
    return np.asarray(np.moveaxis(image, 0, -1) if len(image) == 3 else image[0])


def sections(
    found: Mapping[str, AttackResult], exposed: Exposed, patient: int
) -> dict[str, np.ndarray]:
    """One attacked record as "record", and by adversary what it made of it, and its NCC."""
    kept = {"record": section(exposed.images[patient].cpu().numpy())}
    for name, attack in found.items():
        kept[name] = section(attack.reconstructions[patient])
        kept[f"{name}.ncc"] = np.asarray(attack.matches[patient].ncc)
    return kept


def save_sections(found: Mapping[str, AttackResult], exposed: Exposed, path: Path) -> None:
    """Keep the record that the first attack rebuilt best, and what each attack made of it."""
    best = sections(found, exposed, next(iter(found.values())).best)
    kept: dict[str, Any] = {
        name: value.astype(np.float16) if value.ndim else value for name, value in best.items()
    }
    with atomic(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **kept)


def load_sections(path: Path) -> dict[str, np.ndarray]:
    """What `save_sections` kept."""
    with np.load(path) as stored:
        return {name: stored[name].astype(np.float32) for name in stored.files}


def draw_grid(
    columns: Sequence[tuple[str, Mapping[str, np.ndarray]]],
    titles: Mapping[str, str],
    path: Path,
    heading: str = "",
) -> None:
    """Records side by side, and below each what every attack made of it.

    Args:
        columns: title and `sections` of each record.
        titles: by adversary.
        path: of the picture.
        heading: of the picture.
    """
    lines = {"record": "record", **titles}
    figure, axes = plt.subplots(
        len(lines), len(columns), figsize=(1.4 * len(columns) + 0.3, 1.62 * len(lines) + 0.5),
        squeeze=False,
    )  # fmt: skip
    for column, (above, kept) in enumerate(columns):
        for axis, (name, title) in zip(axes[:, column], lines.items(), strict=True):
            _show(axis, kept[name], kept["record"])
            if name in titles:
                axis.set_xlabel(f"NCC {float(kept[f'{name}.ncc']):.3f}", fontsize=8)
            if column == 0:
                axis.set_ylabel(title, fontsize=8)
        axes[0, column].set_title(above, fontsize=9)
    figure.suptitle(heading, fontsize=10)
    save_figure(figure, path)


def draw_patients(found: Mapping[str, AttackResult], exposed: Exposed, path: Path) -> None:
    """The first patients of one run: the record, then each adversary's reconstruction."""
    patients = range(min(_MOST_PATIENTS, len(exposed.images)))
    columns = [("", sections(found, exposed, patient)) for patient in patients]
    draw_grid(columns, {name: ADVERSARIES[name].title for name in found}, path)


def draw_curves(rows: Sequence[Row], metric: str, titles: Mapping[str, str], path: Path) -> None:
    """Utility, bounds and attacks over the budgets.

    Args:
        rows: of the study.
        metric: name of the utility.
        titles: by adversary.
        path: of the picture.
    """
    places = np.arange(len(rows))
    figure, axis = plt.subplots(figsize=(8.4, 4.4))
    utility = np.array([row.utility for row in rows])
    spread = np.array([row.spread or 0.0 for row in rows])
    axis.errorbar(
        places, utility, spread, color=COLOURS[0], lw=2.4, marker="o", capsize=3, label=metric
    )
    for (name, title), colour in zip(titles.items(), COLOURS[1:] * 2):
        correlation = [row.attacks[name].ncc for row in rows]
        axis.plot(places, correlation, color=colour, marker="s", ms=4, label=f"NCC, {title}")
    for values, style, label in (
        ([row.risk.worst_case for row in rows], "--", "worst case, bound"),
        ([row.risk.relaxed for row in rows], ":", "relaxed, bound"),
    ):
        axis.plot(places, values, style, color="0.45", label=label)
    chance = max(attack.chance_ncc for row in rows for attack in row.attacks.values())
    axis.axhline(chance, color="0.8", lw=1, zorder=0, label="NCC, chance")
    axis.set_xticks(
        places,
        [
            f"{budget(row.epsilon)}\n"
            + ("no noise" if math.isinf(row.epsilon) else _short(row.noise_multiplier))
            for row in rows
        ],
        fontsize=8,
    )
    axis.set_xlabel("epsilon, and noise multiplier below it", fontsize=9)
    axis.set_ylim(-0.05, 1.05)
    axis.grid(axis="y", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def _short(noise_multiplier: float) -> str:
    return f"{noise_multiplier:.2g}" if noise_multiplier >= 0.01 else f"{noise_multiplier:.0e}"


def _show(axis: Axes, picture: np.ndarray, truth: np.ndarray) -> None:
    low, high = float(truth.min()), float(truth.max())
    if picture.ndim == 3:
        picture = ((picture - low) / max(high - low, 1e-9)).clip(0, 1)
    axis.imshow(picture, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
