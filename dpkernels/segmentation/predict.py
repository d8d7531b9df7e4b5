"""Label maps for new scans, on the grid of their own files."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib

from dpkernels.segmentation.config import DataConfig
from dpkernels.segmentation.data import prepare
from dpkernels.segmentation.decathlon import Scan, scan_name
from dpkernels.segmentation.evaluate import Predictor
from dpkernels.segmentation.volume import check_headers, load_volume
from dpkernels.training.progress import Display


def predict_path(
    predictor: Predictor,
    config: DataConfig,
    source: Path,
    target: Path,
    *,
    channels: int,
    divisor: int,
    display: Display,
) -> list[Path]:
    """Segment a file, or every NIfTI file of a folder.

    Args:
        predictor: the trained network.
        config: how scans are prepared.
        source: file or folder.
        target: folder for the label maps, created when absent.
        channels: modalities the network was trained on.
        divisor: the network's total stride.
        display: where progress goes.

    Returns:
        The written files, named like their images.

    Raises:
        ValueError: no scan found, a faulty one, or `target` is the folder of the images.
    """
    paths = _find(source)
    folder = source if source.is_dir() else source.parent
    if target.resolve() == folder.resolve():
        raise ValueError(f"OUT must be another folder than the images' ({target})")
    scans = [Scan(scan_name(path), scan_name(path), path, None) for path in paths]
    for scan in scans:
        check_headers(scan)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    with display.counting("Predicting", len(scans)) as advance:
        for scan in scans:
            volume = load_volume(scan, channels=channels)
            prediction = predictor.segment(prepare(volume, config, divisor), volume)
            path = target / f"{scan.name}.nii.gz"
            nib.save(volume.to_native(prediction), path)
            written.append(path)
            advance()
    return written


def _find(source: Path) -> list[Path]:
    if source.is_file():
        scan_name(source)
        return [source]
    if not source.is_dir():
        raise ValueError(f"IN must be a NIfTI file or a folder of them; {source} does not exist")
    paths = sorted(p for p in source.glob("*.nii*") if not p.name.startswith("._"))
    if not paths:
        raise ValueError(f"IN must hold .nii.gz or .nii files; {source} has none")
    return paths
