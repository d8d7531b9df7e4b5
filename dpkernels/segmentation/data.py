"""From scans to the network's input: preparation, crops, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
import torch.nn.functional as F

from dpkernels.segmentation.config import DataConfig
from dpkernels.segmentation.scans import Scan, ScanFolder
from dpkernels.segmentation.volume import Volume, check_headers, load_volume
from dpkernels.training.reading import for_each
from dpkernels.training.store import RecordStore

_FOREGROUND_VOXELS = 4096


@dataclass(frozen=True)
class Case:
    """A prepared scan.

    Attributes:
        image: [M, X, Y, Z], float32, resampled, normalised, padded.
        label: [1, X, Y, Z], uint8, on the same grid; zero for scans without a label.
        content: [3], voxels before padding (padding is added at the end of each axis).
        foreground: [n, 3], labelled voxels to centre crops on, at most a few thousand.
    """

    image: torch.Tensor
    label: torch.Tensor
    content: tuple[int, int, int]
    foreground: torch.Tensor


def prepare(volume: Volume, config: DataConfig, divisor: int) -> Case:
    """Resample, normalise and pad one volume.

    Args:
        volume: the scan.
        config: grid and intensity rules.
        divisor: every axis is padded to a multiple of it (the network's total stride).
    """
    image = torch.from_numpy(volume.image)
    if config.intensity == "window":
        low, high = config.window
        image = ((image - low) / (high - low)).clamp_(0.0, 1.0)
    else:
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        image = (image - mean) / image.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
    content = _target_shape(image.shape[1:], volume.spacing, config)
    image = F.interpolate(image[None], size=content, mode="trilinear", align_corners=False)[0]
    label = torch.zeros(1, *content, dtype=torch.uint8)
    if volume.label is not None:
        native = torch.from_numpy(volume.label)[None, None].float()
        label = F.interpolate(native, size=content, mode="nearest-exact")[0].to(torch.uint8)
    padding = _at_the_ends([-size % divisor for size in content])
    return Case(
        F.pad(image, padding, value=float(image.min())),
        F.pad(label, padding),
        content,
        _foreground(label),
    )


def _at_the_ends(missing: Sequence[int]) -> list[int]:
    """The argument of `F.pad` that adds `missing` voxels at the end of each axis."""
    return [width for count in reversed(missing) for width in (0, count)]


def _foreground(label: torch.Tensor) -> torch.Tensor:
    voxels = label[0].nonzero()
    return voxels[:: math.ceil(len(voxels) / _FOREGROUND_VOXELS) or 1]


def restore(logits: torch.Tensor, case: Case, volume: Volume) -> torch.Tensor:
    """Network output [C, X, Y, Z] on the prepared grid back to class indices [X, Y, Z] in RAS."""
    x, y, z = case.content
    native = F.interpolate(
        logits[None, :, :x, :y, :z].float(),
        size=volume.image.shape[1:],
        mode="trilinear",
        align_corners=False,
    )
    return native[0].argmax(dim=0).to(torch.uint8)


def _target_shape(
    shape: Sequence[int], spacing: Sequence[float], config: DataConfig
) -> tuple[int, int, int]:
    wanted = config.spacing
    if wanted is None:
        x, y, z = config.shape or shape
    else:
        x, y, z = (max(1, round(n * s / w)) for n, s, w in zip(shape, spacing, wanted, strict=True))
    return x, y, z


class CaseStore(RecordStore[Scan, Case]):
    """Prepared scans.

    Args:
        folder: the scans.
        config: grid, intensities and crops.
        divisor: see `prepare`.
    """

    record = "scan"
    folder: ScanFolder
    config: DataConfig

    def __init__(self, folder: ScanFolder, config: DataConfig, divisor: int) -> None:
        super().__init__(folder, config)
        self.divisor = divisor
        self._prints: dict[str, bytes] = {}

    def read_all(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """Check every header, then read every scan, before any training.

        Raises:
            ValueError: the faulty files, each by name; one scan given to two patients.
        """
        for_each(self.folder.records, check_headers, "scans")
        super().read_all(on_progress)
        owner: dict[bytes, Scan] = {}
        for scan in self.folder.records:
            other = owner.setdefault(self._prints[scan.name], scan)
            if other.patient_id != scan.patient_id:
                raise ValueError(
                    f"{other.image} and {scan.image} have the same voxels, but the patients "
                    f"{other.patient_id} and {scan.patient_id}: the guarantee would hold for "
                    "each copy, not for the person. Give both one patient_id, or remove one"
                )

    def volume(self, scan: Scan) -> Volume:
        """The scan on its native grid."""
        return load_volume(scan, channels=len(self.folder.modalities), labels=self.folder.labels)

    def load(self, scan: Scan) -> Case:
        """See `RecordStore`; also remembers what the scan's voxels are, for `read_all`."""
        volume = self.volume(scan)
        if scan.name not in self._prints:
            self._prints[scan.name] = blake2b(volume.image.tobytes()).digest()
        return prepare(volume, self.config, self.divisor)

    def view(self, scan: Scan, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A crop, or the whole scan: image [M, *crop] float32 and label [1, *crop] uint8."""
        case = self.item(scan)
        if self.config.crop is None:
            return case.image, case.label
        return crop_view(case, self.config.crop, self.config.foreground_share, rng)


def crop_view(
    case: Case, size: Sequence[int], foreground_share: float, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random crop; with chance `foreground_share` it has a labelled voxel at its centre.

    A case without labelled voxels is cropped anywhere; a case smaller than the crop is padded at
    the end of each axis.

    Args:
        case: a prepared, labelled scan.
        size: of the crop, voxels.
        foreground_share: chance of centring on a labelled voxel.
        rng: decides.

    Returns:
        image [M, *size] and label [1, *size].
    """
    shape = case.image.shape[1:]
    room = [max(n - s, 0) for n, s in zip(shape, size, strict=True)]
    start = [int(rng.integers(0, r + 1)) for r in room]
    if len(case.foreground) and rng.random() < foreground_share:
        centre = case.foreground[int(rng.integers(len(case.foreground)))].tolist()
        start = [min(max(c - s // 2, 0), r) for c, s, r in zip(centre, size, room, strict=True)]
    box = tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))
    padding = _at_the_ends([max(s - n, 0) for n, s in zip(shape, size, strict=True)])
    everything = (slice(None), *box)
    image = F.pad(case.image[everything], padding, value=float(case.image.min()))
    return image, F.pad(case.label[everything], padding)
