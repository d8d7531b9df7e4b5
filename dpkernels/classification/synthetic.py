"""Synthetic skin lesions with signal, written in the layouts of public data sets.

Every lesion is drawn from the seed: skin, hairs, and a blob that is round, even and brown when it
is benign, ragged, uneven and darker when it is not; the two overlap, so no model is right always.
No real patient is behind any pixel, so pictures and results made from it may be published.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

#: diagnosis code of HAM10000, how often it is drawn, and how ragged and uneven it is
_KINDS = ("nv", "bkl", "mel", "bcc", "akiec")
_CHANCES = (0.4, 0.15, 0.25, 0.1, 0.1)
_ODDNESS = (0.15, 0.3, 1.0, 0.8, 0.9)
_TWICE = 0.25  # share of lesions that are photographed twice
_SKIN = np.array([0.87, 0.68, 0.58])
_BROWN = np.array([0.52, 0.32, 0.22])
_DARK = np.array([0.22, 0.14, 0.16])


@dataclass(frozen=True)
class SyntheticImage:
    """One synthetic photograph: pixels [H, W, 3] uint8, its lesion and its diagnosis."""

    name: str
    lesion_id: str
    diagnosis: str
    pixels: np.ndarray


def make_lesion(lesion: int, *, size: int = 32, seed: int = 0) -> list[SyntheticImage]:
    """Draw one lesion, photographed once or twice.

    Args:
        lesion: number of the lesion; with `seed` it fixes every pixel.
        size: of the images, pixels.
        seed: of the data set.

    Raises:
        ValueError: `size` is below 16, where borders vanish.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    rng = np.random.default_rng([seed, lesion])
    kind = int(rng.choice(len(_KINDS), p=_CHANCES))
    oddness = float(np.clip(_ODDNESS[kind] + rng.normal(0, 0.2), 0, 1.4))
    shape = _Shape(rng, oddness)
    photographs = 1 + int(rng.random() < _TWICE)
    return [
        SyntheticImage(
            f"SYN_{lesion:05d}_{number}", f"LES_{lesion:05d}", _KINDS[kind], shape.draw(rng, size)
        )
        for number in range(photographs)
    ]


class _Shape:
    """What stays the same from one photograph of a lesion to the next."""

    def __init__(self, rng: np.random.Generator, oddness: float) -> None:
        self._oddness = oddness
        self._radius = rng.uniform(0.3, 0.55)
        self._phases = rng.uniform(0, 2 * np.pi, size=6)
        self._waves = rng.normal(0, 0.10 * oddness, size=6)
        self._tone = rng.uniform(0.0, 0.35) + 0.3 * oddness
        self._skin = _SKIN * rng.uniform(0.85, 1.1)

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """[size, size, 3], uint8: from another place and angle each time."""
        axis = (np.arange(size) + 0.5) / size * 2 - 1
        x, y = np.meshgrid(axis - rng.uniform(-0.2, 0.2), axis - rng.uniform(-0.2, 0.2))
        angle = np.arctan2(y, x) + rng.uniform(0, 2 * np.pi)
        edge = self._radius * (
            1
            + sum(
                wave * np.cos((k + 2) * angle + phase)
                for k, (wave, phase) in enumerate(zip(self._waves, self._phases, strict=True))
            )
        )
        inside = 1 / (1 + np.exp((np.hypot(x, y) - edge) * (16 - 6 * self._oddness)))
        patches = gaussian_filter(rng.normal(size=(size, size)), size / 10) * size / 4
        dark = np.clip(self._tone + 0.25 * self._oddness * patches, 0, 1)[..., None]
        lesion = (1 - dark) * _BROWN + dark * _DARK
        picture = (1 - inside[..., None]) * self._skin + inside[..., None] * lesion
        picture = picture * rng.uniform(0.85, 1.1) + rng.normal(0, 0.03, size=picture.shape)
        for _ in range(int(rng.integers(0, 3))):
            picture = _hair(picture, rng)
        return np.asarray(np.clip(picture * 255, 0, 255).astype(np.uint8))


def _hair(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size = len(picture)
    t = np.linspace(-1, 1, 4 * size)
    x = (0.5 + rng.uniform(-0.4, 0.4) + t * rng.uniform(-0.5, 0.5)) * size
    y = (0.5 + 0.5 * t) * size + rng.uniform(-0.1, 0.1) * size * t**2
    keep = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    marked = picture.copy()
    marked[y[keep].astype(int), x[keep].astype(int)] *= 0.6
    return marked


def write_synthetic(
    folder: str | Path,
    *,
    lesions: int,
    size: int = 32,
    seed: int = 0,
    layout: str = "ham10000",
    on_progress: Callable[[], None] = lambda: None,
) -> Path:
    """Write a data set to disk; one that is there already is left alone.

    Args:
        folder: where to; it appears when it is complete.
        lesions: number of lesions.
        size: of the images, pixels.
        seed: another seed gives other lesions.
        layout: "ham10000", "folders" or "table".
        on_progress: called after each lesion.

    Raises:
        ValueError: no such layout, or the folder holds something else.
    """
    target = Path(folder)
    if layout not in _WRITERS:
        raise ValueError(f"layout must be one of {', '.join(_WRITERS)}; got {layout!r}")
    if (target / _COMPLETE).is_file():
        return target
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target}: not empty and not a synthetic data set; choose another folder")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    images: list[SyntheticImage] = []
    for lesion in range(lesions):
        images += make_lesion(lesion, size=size, seed=seed)
        on_progress()
    _WRITERS[layout](partial, images)
    (partial / _COMPLETE).write_text(f"{lesions} lesions, {size} pixels, seed {seed}\n")
    if target.exists():
        target.rmdir()
    partial.replace(target)
    return target


_COMPLETE = "synthetic.txt"


def _write_ham10000(folder: Path, images: Sequence[SyntheticImage]) -> None:
    rows = []
    for number, image in enumerate(images):
        part = folder / f"HAM10000_images_part_{1 + 2 * number // len(images)}"
        _save(image, part / f"{image.name}.jpg")
        rows.append((image.lesion_id, image.name, image.diagnosis, "synthetic"))
    _table(folder / "HAM10000_metadata.csv", ("lesion_id", "image_id", "dx", "dx_type"), rows)


def _write_folders(folder: Path, images: Sequence[SyntheticImage]) -> None:
    for image in images:
        _save(image, folder / image.diagnosis / f"{image.name}.png")


def _write_table(folder: Path, images: Sequence[SyntheticImage]) -> None:
    rows = []
    for image in images:
        name = f"radiology_ai/XR/skin/{image.diagnosis}/{image.name}.png"
        _save(image, folder / name)
        rows.append((name, image.diagnosis))
    _table(folder / "RadiologyAI_train.csv", ("filename", "label"), rows)


_WRITERS: dict[str, Callable[[Path, Sequence[SyntheticImage]], None]] = {
    "ham10000": _write_ham10000,
    "folders": _write_folders,
    "table": _write_table,
}


def _save(image: SyntheticImage, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.pixels).save(path, quality=95)


def _table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
