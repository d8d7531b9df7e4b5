"""From scans to the network's input: preparation, cache, split, and one row block per patient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
import torch.nn.functional as F

from dpkernels.segmentation.config import DataConfig
from dpkernels.segmentation.decathlon import DecathlonFolder, Scan
from dpkernels.segmentation.volume import Volume, check_headers, load_volume
from dpkernels.training.augment import Augmentation, augmented
from dpkernels.training.reading import for_each
from dpkernels.training.sampling import PatientViews

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
    padding: list[int] = []
    for size in reversed(content):
        padding += [0, math.ceil(size / divisor) * divisor - size]
    return Case(
        F.pad(image, padding, value=float(image.min())),
        F.pad(label, padding),
        content,
        _foreground(label),
    )


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


class CaseStore:
    """Prepared scans, read once (cache "memory") or on every access ("none")."""

    def __init__(self, folder: DecathlonFolder, config: DataConfig, divisor: int) -> None:
        self.folder = folder
        self.config = config
        self.divisor = divisor
        self._cases: dict[str, Case] = {}

    def read_all(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """Check every header, then read every scan, before any training.

        Raises:
            ValueError: the faulty files, each by name; one scan given to two patients.
        """
        for_each(self.folder.scans, check_headers, "scans")
        prints: dict[str, bytes] = {}

        def read(scan: Scan) -> None:
            volume = self.volume(scan)
            prints[scan.name] = blake2b(volume.image.tobytes()).digest()
            if self.config.cache == "memory":
                self._cases[scan.name] = prepare(volume, self.config, self.divisor)
            on_progress()

        for_each(self.folder.scans, read, "scans")
        owner: dict[bytes, Scan] = {}
        for scan in self.folder.scans:
            other = owner.setdefault(prints[scan.name], scan)
            if other.patient_id != scan.patient_id:
                raise ValueError(
                    f"{other.image} and {scan.image} have the same voxels, but the patients "
                    f"{other.patient_id} and {scan.patient_id}: the guarantee would hold for "
                    "each copy, not for the person. Give both one patient_id, or remove one"
                )

    def volume(self, scan: Scan) -> Volume:
        """The scan on its native grid."""
        return load_volume(scan, channels=len(self.folder.modalities), labels=self.folder.labels)

    def case(self, scan: Scan) -> Case:
        """The prepared scan."""
        return self._cases.get(scan.name) or self._load(scan)

    def _load(self, scan: Scan) -> Case:
        return prepare(self.volume(scan), self.config, self.divisor)


class PatientDataset(PatientViews):
    """One item per patient: K views, cropped and augmented, as adjacent rows.

    A view is drawn from any of the patient's scans. What is drawn depends only on the seed, the
    step and the patient, so a resumed run draws what the uninterrupted one would have.
    """

    def __init__(
        self, patients: Sequence[str], store: CaseStore, augment: Augmentation | None, seed: int
    ) -> None:
        self.patients = list(patients)
        self.store = store
        self._augment = augment
        self._seed = seed
        self._scans = store.folder.patients

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The patient's views.

        Returns:
            image [K, M, *crop] float32 and label [K, 1, *crop] uint8.
        """
        rng = np.random.default_rng([self._seed, self.step, index])
        scans = self._scans[self.patients[index]]
        views = [
            self._view(scans[int(rng.integers(len(scans)))], rng)
            for _ in range(self.store.config.views_per_patient)
        ]
        images, labels = zip(*views, strict=True)
        return torch.stack(images), torch.stack(labels)

    def _view(self, scan: Scan, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        case, config = self.store.case(scan), self.store.config
        image, label = case.image, case.label
        if config.crop is not None:
            image, label = crop_view(case, config.crop, config.foreground_share, rng)
        if self._augment is not None:
            sample = augmented(self._augment, {"image": image, "label": label}, rng)
            image, label = sample["image"].float(), sample["label"]
        return image, label.to(torch.uint8)


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
    padding: list[int] = []
    for n, s in zip(reversed(shape), reversed(size), strict=True):
        padding += [0, max(s - n, 0)]
    everything = (slice(None), *box)
    image = F.pad(case.image[everything], padding, value=float(case.image.min()))
    return image, F.pad(case.label[everything], padding)
