"""A synthetic liver CT with signal, written as a Medical Segmentation Decathlon folder.

Every patient is drawn from the seed: body, fat, spine, ribs, lungs, spleen, kidneys, stomach, a
two-lobed liver and one to three tumours, in Hounsfield units with acquisition noise. No real
patient is behind any voxel, so pictures and results made from it may be published.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

LABELS = {"0": "background", "1": "liver", "2": "cancer"}
LIVER, TUMOUR = 1, 2
_FIELD_OF_VIEW_MM = 336.0

_AIR, _FAT, _MUSCLE, _LUNG, _BONE = -1000.0, -95.0, 50.0, -820.0, 420.0
_SPLEEN, _KIDNEY, _STOMACH, _LIVER_HU, _TUMOUR_HU = 125.0, 170.0, 25.0, 105.0, 45.0


@dataclass(frozen=True)
class PhantomScan:
    """One synthetic scan.

    Attributes:
        image: [X, Y, Z], int16, Hounsfield units, axes in RAS order.
        label: [X, Y, Z], uint8, values of `LABELS`.
        affine: [4, 4], float64, voxel to world, millimetres.
    """

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray


def make_phantom(patient: int, *, size: int = 48, seed: int = 0) -> PhantomScan:
    """Draw one synthetic patient.

    Args:
        patient: number of the patient; with `seed` it fixes every voxel.
        size: voxels along the left-right axis; the two other axes are a little shorter.
        seed: seed of the cohort.

    Raises:
        ValueError: `size` is below 16, where the organs would vanish.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 voxels, got {size}")
    rng = np.random.default_rng([seed, patient])
    shape = (
        size,
        size - int(rng.integers(0, size // 12 + 1)),
        size - int(rng.integers(0, size // 6 + 1)),
    )
    spacing = _FIELD_OF_VIEW_MM / size * rng.uniform(0.95, 1.05, size=3)
    centre = rng.uniform(-0.06, 0.06, size=3)
    axes = [
        (np.arange(n) + 0.5 - n / 2) * step / (_FIELD_OF_VIEW_MM / 2) - shift
        for n, step, shift in zip(shape, spacing, centre, strict=True)
    ]
    axes[0] = -axes[0]  # voxels run to the patient's right, the anatomy to their left
    grid = np.meshgrid(*axes, indexing="ij")
    image, label = _anatomy(grid, rng)
    image = gaussian_filter(image, sigma=0.45)
    image += gaussian_filter(rng.normal(0.0, 1.0, size=shape), sigma=0.5) * 45.0
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.asarray(shape) * spacing / 2 + rng.uniform(-20, 20, size=3)
    return PhantomScan(np.clip(np.round(image), -1024, 3071).astype(np.int16), label, affine)


def write_phantom(
    folder: str | Path,
    *,
    patients: int,
    size: int = 48,
    seed: int = 0,
    on_progress: Callable[[], None] = lambda: None,
) -> Path:
    """Write a cohort in Decathlon layout: dataset.json, imagesTr/, labelsTr/.

    Args:
        folder: created when absent; must not hold another data set.
        patients: number of patients, one scan each.
        size: see `make_phantom`.
        seed: seed of the cohort.
        on_progress: called without arguments after each patient.

    Returns:
        The folder.

    Raises:
        ValueError: `patients` is below 1, or `folder` holds files that are not this cohort's.
    """
    if patients < 1:
        raise ValueError(f"patients must be at least 1, got {patients}")
    root = Path(folder)
    description = _description(patients, size, seed)
    manifest = root / "dataset.json"
    if manifest.exists() and json.loads(manifest.read_text()) == description:
        return root
    if root.exists() and any(root.iterdir()):
        raise ValueError(
            f"folder must be empty or hold this very phantom (patients={patients}, size={size}, "
            f"seed={seed}); {root} holds something else. Choose another folder or delete it"
        )
    unfinished = root.with_name(f".{root.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in ("imagesTr", "labelsTr"):
        (unfinished / name).mkdir(parents=True)
    for patient, entry in enumerate(description["training"]):
        scan = make_phantom(patient, size=size, seed=seed)
        _save(scan.image, scan.affine, unfinished / entry["image"])
        _save(scan.label, scan.affine, unfinished / entry["label"])
        on_progress()
    (unfinished / "dataset.json").write_text(json.dumps(description, indent=1))
    unfinished.replace(root)
    return root


def _description(patients: int, size: int, seed: int) -> dict:
    return {
        "name": "Liver phantom",
        "description": f"Synthetic liver CT ({patients} patients, size {size}, seed {seed})",
        "reference": "dpkernels.segmentation.phantom",
        "licence": "Apache-2.0",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": dict(LABELS),
        "numTraining": patients,
        "numTest": 0,
        "training": [
            {
                "image": f"./imagesTr/phantom_{patient:03d}.nii.gz",
                "label": f"./labelsTr/phantom_{patient:03d}.nii.gz",
                "patient_id": f"phantom_{patient:03d}",
            }
            for patient in range(patients)
        ],
        "test": [],
    }


def _save(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def _ellipsoid(
    grid: Sequence[np.ndarray], centre: Sequence[float], radii: Sequence[float]
) -> np.ndarray:
    """Squared normalised radius: below 1 inside. `grid` in half fields of view."""
    parts = [((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)]
    return np.sum(np.broadcast_arrays(*parts), axis=0)


def _anatomy(grid: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Organs from the outside in. The patient's right, where the liver lies, is x < 0."""
    x, y, z = grid

    def about(value: float, spread: float = 0.03) -> float:
        return value + rng.normal(0.0, spread)

    width, depth = about(0.86), about(0.66)
    body = (x / width) ** 2 + (y / depth) ** 2
    fat = about(0.80, 0.03)
    image = np.full(x.shape, _AIR)
    image[body < 1] = _FAT + rng.normal(0, 5)
    inner = body < fat
    image[inner] = _MUSCLE + rng.normal(0, 6)

    spine = _ellipsoid((x, y), (about(0, 0.01), about(-0.42 * depth / 0.66, 0.01)), (0.10, 0.10))
    image[spine < 1] = _BONE * rng.uniform(0.8, 1.1)
    image[spine < 0.18] = 35.0
    rib = np.abs((x / width) ** 2 + (y / depth) ** 2 - fat * 0.93) < 0.045
    image[rib & (np.sin(26 * z + 3 * y + rng.uniform(0, 6)) > 0.45)] = _BONE * 0.6

    dome = about(0.50, 0.05)
    for side in (-1, 1):
        lung = _ellipsoid(grid, (side * 0.40, 0.0, dome + 0.55), (0.34, 0.44, about(0.62)))
        image[(lung < 1) & inner] = _LUNG + rng.normal(0, 20)
        kidney = _ellipsoid(
            grid, (side * about(0.34), about(-0.27), about(-0.42, 0.05)), (0.13, 0.12, 0.24)
        )
        image[(kidney < 1) & inner] = _KIDNEY + rng.normal(0, 10)
    spleen = _ellipsoid(grid, (about(0.54), about(-0.16), about(0.08)), (0.16, 0.23, 0.27))
    image[(spleen < 1) & inner] = _SPLEEN + rng.normal(0, 8)
    stomach = _ellipsoid(grid, (about(0.28), about(0.22), about(0.14)), (0.24, 0.20, 0.25))
    image[(stomach < 1) & inner] = _STOMACH + rng.normal(0, 8)

    right = _ellipsoid(
        grid,
        (about(-0.38), about(0.02), about(0.02, 0.05)),
        (about(0.38), about(0.42), about(0.46)),
    )
    left = _ellipsoid(
        grid,
        (about(-0.02), about(0.23), about(0.16, 0.05)),
        (about(0.34), about(0.20), about(0.21)),
    )
    liver = ((right < 1) | (left < 1)) & inner & (spine > 1.3)
    image[liver] = _LIVER_HU + rng.normal(0, 8)
    label = np.where(liver, LIVER, 0).astype(np.uint8)

    voxels = np.argwhere(liver)
    for _ in range(int(rng.integers(1, 4))):
        centre = voxels[rng.integers(len(voxels))]
        position = [g[tuple(centre)] for g in grid]
        radius = rng.uniform(0.07, 0.15)
        tumour = (_ellipsoid(grid, position, [radius] * 3) < 1) & liver
        image[tumour] = _TUMOUR_HU + rng.normal(0, 8)
        label[tumour] = TUMOUR
    return image, label
