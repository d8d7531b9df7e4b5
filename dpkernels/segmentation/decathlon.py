"""A Medical Segmentation Decathlon folder: which scans, of which patients, with which labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpkernels.segmentation.scans import Found, Scan, scan_name

MANIFEST = "dataset.json"


def read_decathlon(folder: Path) -> Found:
    """Read dataset.json and look for the files that it lists.

    Args:
        folder: with dataset.json, imagesTr and labelsTr.

    Raises:
        ValueError: the folder, dataset.json, a key of it or a listed file is missing or malformed;
            the message names the file, what was found and what is expected.
    """
    path = folder / MANIFEST
    manifest = _manifest(folder)
    labels, modalities = _labels(path, manifest), _modalities(path, manifest)
    scans, notes = [], []
    for number, entry in enumerate(_entries(path, manifest)):
        files = [folder / entry[key] for key in ("image", "label")]
        if any(file.name.startswith("._") for file in files):
            notes.append(f"Skipped {entry['image']}: a macOS leftover, not a scan.")
            continue
        for key, file in zip(("image", "label"), files, strict=True):
            if not file.is_file():
                raise ValueError(
                    f"{file}: no such file; {path} lists it as the {key} of training entry {number}"
                )
        identifier = entry.get("patient_id")
        patient = "" if identifier is None else str(identifier).strip()
        scans.append(Scan(scan_name(entry["image"]), patient, *files))
    if not scans:
        raise ValueError(f"{path}: `training` lists no scan")
    return Found(tuple(scans), labels, modalities, path, tuple(notes))


def _manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"data.root must be a Decathlon folder; {folder} is not a folder")
    if not path.is_file():
        inner = [p.parent for p in folder.glob(f"*/{MANIFEST}")]
        hint = f"; did you mean {inner[0]}?" if inner else ""
        raise ValueError(
            f"{path}: no such file; expected a Medical Segmentation Decathlon folder with "
            f"dataset.json, imagesTr and labelsTr{hint}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path}: expected an object, found {type(manifest).__name__}")
    return manifest


def _labels(path: Path, manifest: dict) -> dict[int, str]:
    found: Any = manifest.get("labels")
    try:
        labels = {int(value): str(name) for value, name in found.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f'{path}: `labels` must map values to names, {{"0": "background", "1": ...}}; '
            f"found {found!r}"
        ) from None
    if sorted(labels) != list(range(len(labels))) or len(labels) < 2:
        raise ValueError(
            f"{path}: `labels` must be the values 0 to n without gaps, 0 being the background; "
            f"found {sorted(labels)}"
        )
    return dict(sorted(labels.items()))


def _modalities(path: Path, manifest: dict) -> tuple[str, ...]:
    """The names of the channels; nnU-Net calls them `channel_names`."""
    found = manifest.get("modality", manifest.get("channel_names", {"0": "CT"}))
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f'{path}: `modality` must map channels to names, {{"0": "CT"}}; found {found!r}'
        )
    return tuple(str(name) for name in found.values())


def _entries(path: Path, manifest: dict) -> list[dict]:
    entries = manifest.get("training")
    if not isinstance(entries, list):
        raise ValueError(
            f"{path}: `training` must be a list of {{image, label}} entries; found "
            f"{type(entries).__name__}"
        )
    for number, entry in enumerate(entries):
        named = isinstance(entry, dict) and all(
            isinstance(entry.get(key), str) for key in ("image", "label")
        )
        if not named:
            raise ValueError(
                f"{path}: training entry {number} must have `image` and `label`, the paths of two "
                f"files; found {entry!r}"
            )
    return entries
