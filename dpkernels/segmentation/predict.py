"""Label maps for new scans, on the grid of their own files."""

from __future__ import annotations

import gzip
from pathlib import Path

from dpkernels.segmentation.config import DataConfig
from dpkernels.segmentation.data import prepare
from dpkernels.segmentation.evaluate import Predictor
from dpkernels.segmentation.scans import Scan, scan_name
from dpkernels.segmentation.volume import check_headers, load_volume
from dpkernels.training.progress import Display
from dpkernels.training.run_folder import atomic


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
        ValueError: no scan found, a faulty one, or label maps of these names in `target`.
    """
    paths = _find(source)
    folder = source if source.is_dir() else source.parent
    if target.resolve() == folder.resolve():
        raise ValueError(f"OUT must be another folder than the images' ({target})")
    scans = [Scan(scan_name(path), scan_name(path), path, None) for path in paths]
    files = [target / f"{scan.name}.nii.gz" for scan in scans]
    for path in files:
        if path.exists() or files.count(path) > 1:
            raise ValueError(
                f"OUT: {path} {'exists already' if path.exists() else 'would be written twice'}; "
                "nothing is overwritten, choose another folder"
            )
    for scan in scans:
        check_headers(scan)
    target.mkdir(parents=True, exist_ok=True)
    with display.counting("Predicting", len(scans)) as advance:
        for scan, path in zip(scans, files, strict=True):
            volume = load_volume(scan, channels=channels)
            prediction = predictor.segment(prepare(volume, config, divisor), volume)
            with atomic(path) as partial:
                partial.write_bytes(gzip.compress(volume.to_native(prediction).to_bytes()))
            advance()
    return files


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
