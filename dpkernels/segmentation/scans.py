"""Scans with their label maps: what every layout of a data set comes to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpkernels.training.cohort import Cohort

SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Scan:
    """One scan of one patient; `label` is None for scans to predict.

    Attributes:
        name: unique in its data set.
        patient_id: whose it is; "" while nobody has said so.
        image: NIfTI file.
        label: NIfTI file of its label map.
    """

    name: str
    patient_id: str
    image: Path
    label: Path | None


@dataclass(frozen=True)
class Found:
    """What a layout finds in a folder.

    Attributes:
        scans: the labelled scans, in the order of the data set.
        labels: value to name, background included, from 0 without gaps.
        modalities: one name per image channel; "CT" for Hounsfield units.
        source: file or folder that lists the scans, for errors.
        notes: sentences for the report (files skipped).
    """

    scans: tuple[Scan, ...]
    labels: dict[int, str]
    modalities: tuple[str, ...]
    source: Path
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScanFolder(Cohort[Scan]):
    """A data set of which every scan has its patient.

    Attributes:
        labels: value to name, background included.
        modalities: one name per image channel.
    """

    labels: dict[int, str]
    modalities: tuple[str, ...]


def scan_name(path: str | Path) -> str:
    """File name without .nii or .nii.gz.

    Raises:
        ValueError: another suffix.
    """
    name = Path(path).name
    if not name.endswith(SUFFIXES):
        raise ValueError(f"{path}: expected a NIfTI file (.nii.gz or .nii)")
    return name.removesuffix(".gz").removesuffix(".nii")
