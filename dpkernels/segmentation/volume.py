"""NIfTI in and out: every fault is named by file before training starts, orientation is undone.

Inside, arrays are in RAS order (nibabel's closest canonical axes); `Volume.to_native` puts a label
map back onto the grid of the file it came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Image
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from dpkernels.segmentation.scans import Scan


@dataclass(frozen=True)
class Volume:
    """A scan in memory, in RAS order.

    Attributes:
        name: of the scan.
        image: [M, X, Y, Z], float32, one channel per modality.
        label: [X, Y, Z], uint8, or None.
        spacing: [3], millimetres, along X, Y, Z.
        native_affine: [4, 4], of the file, before reordering.
    """

    name: str
    image: np.ndarray
    label: np.ndarray | None
    spacing: tuple[float, float, float]
    native_affine: np.ndarray

    @property
    def truth(self) -> np.ndarray:
        """The label map of a labelled scan."""
        if self.label is None:
            raise ValueError(f"{self.name}: this scan has no label to compare with")
        return self.label

    def to_native(self, label: np.ndarray) -> Nifti1Image:
        """A label map [X, Y, Z] in RAS order as an image on the file's own grid."""
        from_ras = ornt_transform(axcodes2ornt("RAS"), io_orientation(self.native_affine))
        native = apply_orientation(label.astype(np.uint8), from_ras)
        return Nifti1Image(native, self.native_affine)


def check_headers(scan: Scan) -> None:
    """Compare image and label headers without reading the voxels.

    Raises:
        ValueError: unreadable file, wrong number of dimensions, or image and label that differ in
            shape or affine.
    """
    image = _open(scan.image)
    _spatial_shape(image, scan.image)
    if scan.label is not None:
        _check_pair(image, scan.image, _open(scan.label), scan.label)


def load_volume(scan: Scan, *, channels: int, labels: dict[int, str] | None = None) -> Volume:
    """Read one scan completely and check it.

    Args:
        scan: its files.
        channels: number of modalities that the image must have.
        labels: permitted values of the label map.

    Raises:
        ValueError: a missing, truncated or mismatched file, non-finite voxels, a label value that
            dataset.json does not name; with file, what was found and what is expected.
    """
    image = _open(scan.image)
    shape = _spatial_shape(image, scan.image)
    found = image.shape[3] if len(image.shape) == 4 else 1
    if found != channels:
        raise ValueError(
            f"{scan.image}: shape {image.shape} has {found} modalities, expected {channels} as "
            "dataset.json lists"
        )
    stored = _read(image, scan.image)
    if stored.dtype.kind not in "biuf" or not stored.size:
        raise ValueError(
            f"{scan.image}: voxels of type {stored.dtype}, shape {image.shape}; expected one real "
            "number for each voxel and modality"
        )
    voxels = stored.astype(np.float32).reshape(*shape, channels)
    if not np.isfinite(voxels).all():
        bad = int((~np.isfinite(voxels)).sum())
        raise ValueError(f"{scan.image}: {bad} voxels are NaN or infinite, expected finite numbers")
    if voxels.min() == voxels.max():
        raise ValueError(
            f"{scan.image}: every voxel is {voxels.min():g}, expected a picture; export it again, "
            "or take it out of dataset.json"
        )
    to_ras = io_orientation(image.affine)
    spacing = np.empty(3)
    spacing[to_ras[:, 0].astype(int)] = nib.affines.voxel_sizes(image.affine)
    label = None
    if scan.label is not None:
        label_image = _open(scan.label)
        _check_pair(image, scan.image, label_image, scan.label)
        label = _label_values(_read(label_image, scan.label), scan.label, labels)
        label = np.ascontiguousarray(apply_orientation(label.reshape(shape), to_ras))
    return Volume(
        scan.name,
        np.ascontiguousarray(np.moveaxis(apply_orientation(voxels, to_ras), -1, 0)),
        label,
        (float(spacing[0]), float(spacing[1]), float(spacing[2])),
        image.affine,
    )


def _open(path: Path) -> Nifti1Image:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        image = Nifti1Image.from_filename(path)
    except Exception as error:
        raise ValueError(
            f"{path}: not a readable NIfTI file ({type(error).__name__}: {error}); copy or "
            "download it again"
        ) from None
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise ValueError(
            f"{path}: the affine {image.affine.tolist()} is singular or not finite, expected an "
            "invertible voxel-to-world matrix"
        )
    return image


def _read(image: Nifti1Image, path: Path) -> np.ndarray:
    try:
        return np.asanyarray(image.dataobj)
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be read completely ({type(error).__name__}: {error}); the header "
            f"promises shape {image.shape}. The file is truncated or damaged: copy it again"
        ) from None


def _spatial_shape(image: Nifti1Image, path: Path) -> tuple[int, int, int]:
    if len(image.shape) not in (3, 4):
        raise ValueError(
            f"{path}: shape {image.shape}, expected three dimensions, or four with the modalities "
            "last"
        )
    x, y, z = image.shape[:3]
    return x, y, z


def _check_pair(image: Nifti1Image, image_path: Path, label: Nifti1Image, label_path: Path) -> None:
    label_shape = label.shape[:3] if label.shape[3:] in ((), (1,)) else label.shape
    if label_shape != image.shape[:3]:
        raise ValueError(
            f"{label_path}: shape {label.shape}, but its image {image_path} has shape "
            f"{image.shape}; a label map has the image's voxels"
        )
    tolerance = 0.05 * float(nib.affines.voxel_sizes(image.affine).min())
    if not np.allclose(image.affine, label.affine, rtol=0, atol=max(tolerance, 1e-3)):
        raise ValueError(
            f"{label_path}: affine {np.round(label.affine, 4).tolist()} differs from that of "
            f"{image_path}, {np.round(image.affine, 4).tolist()}; resample the label onto the image"
        )


def _label_values(voxels: np.ndarray, path: Path, labels: dict[int, str] | None) -> np.ndarray:
    values = np.unique(voxels)
    allowed = [value for value in range(256) if labels is None or value in labels]
    wrong = values[~np.isin(values, allowed)].tolist()
    if wrong:
        expected = labels or "whole numbers from 0 to 255"
        raise ValueError(f"{path}: label values {wrong[:5]} found, expected only {expected}")
    return voxels.astype(np.uint8)
