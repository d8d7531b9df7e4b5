"""A Medical Segmentation Decathlon folder: which scans, of which patients, with which labels."""

from __future__ import annotations

import csv
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Scan:
    """One scan of one patient; `label` is None for scans to predict."""

    name: str
    patient_id: str
    image: Path
    label: Path | None


@dataclass(frozen=True)
class DecathlonFolder:
    """What dataset.json says.

    Attributes:
        root: the folder.
        labels: value to name, background included.
        modalities: one name per image channel.
        scans: the labelled scans, in the order of dataset.json.
        grouped: whether somebody said which patient each scan is of; else one file, one patient.
        notes: sentences for the report (grouping assumed, files skipped).
    """

    root: Path
    labels: dict[int, str]
    modalities: tuple[str, ...]
    scans: tuple[Scan, ...]
    grouped: bool
    notes: tuple[str, ...]

    @property
    def patients(self) -> dict[str, tuple[Scan, ...]]:
        """Scans by patient, both in the order of dataset.json."""
        groups: dict[str, list[Scan]] = {}
        for scan in self.scans:
            groups.setdefault(scan.patient_id, []).append(scan)
        return {patient: tuple(scans) for patient, scans in groups.items()}


def scan_name(path: str | Path) -> str:
    """File name without .nii or .nii.gz.

    Raises:
        ValueError: another suffix.
    """
    name = Path(path).name
    for suffix in _SUFFIXES:
        if name.endswith(suffix):
            return name[: -len(suffix)]
    raise ValueError(f"{path}: expected a NIfTI file (.nii.gz or .nii)")


def read_decathlon(root: str | Path, patients_csv: str | Path = "") -> DecathlonFolder:
    """Read dataset.json and group the labelled scans by patient.

    Args:
        root: folder with dataset.json, imagesTr and labelsTr.
        patients_csv: CSV with the columns scan,patient_id; overrides dataset.json.

    Raises:
        ValueError: the folder, dataset.json, a key of it or a listed file is missing or malformed;
            the message names the file, what was found and what is expected.
    """
    folder = Path(root)
    manifest = _manifest(folder)
    labels = _labels(folder, manifest)
    modalities = _modalities(folder, manifest)
    entries, notes = [], []
    for number, entry in enumerate(_entries(folder, manifest)):
        if any(Path(entry[key]).name.startswith("._") for key in ("image", "label")):
            notes.append(f"Skipped {entry['image']}: a macOS leftover, not a scan.")
            continue
        for key in ("image", "label"):
            if not (folder / entry[key]).is_file():
                raise ValueError(
                    f"{folder / entry[key]}: no such file; {folder / 'dataset.json'} lists it as "
                    f"the {key} of training entry {number}"
                )
        entries.append(entry)
    if not entries:
        raise ValueError(f"{folder / 'dataset.json'}: `training` lists no scan")

    names = [scan_name(entry["image"]) for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{folder / 'dataset.json'}: the scan {name} is listed twice")
    patient_of = (
        _patient_table(patients_csv, names)
        if patients_csv
        else {
            name: _patient(entry.get("patient_id"))
            for name, entry in zip(names, entries, strict=True)
            if _patient(entry.get("patient_id"))
        }
    )
    missing = [name for name in names if name not in patient_of]
    if missing and patient_of:
        source = patients_csv or folder / "dataset.json"
        raise ValueError(f"{source}: no patient_id for {_shorten(missing)}; give one to every scan")
    if missing:
        note = (
            "No patient_id is given: every file was taken as a patient of its own. If a patient "
            "has several scans, the guarantee holds per scan, not per patient: add patient_id to "
            "dataset.json or pass a patients CSV."
        )
        warnings.warn(note, stacklevel=2)
        notes.append(note)
    scans = tuple(
        Scan(name, patient_of.get(name, name), folder / e["image"], folder / e["label"])
        for name, e in zip(names, entries, strict=True)
    )
    return DecathlonFolder(folder, labels, modalities, scans, not missing, tuple(notes))


def _manifest(folder: Path) -> dict:
    path = folder / "dataset.json"
    if not folder.is_dir():
        raise ValueError(f"data.root must be a Decathlon folder; {folder} is not a folder")
    if not path.is_file():
        inner = [p.parent for p in folder.glob("*/dataset.json")]
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


def _labels(folder: Path, manifest: dict) -> dict[int, str]:
    path = folder / "dataset.json"
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


def _modalities(folder: Path, manifest: dict) -> tuple[str, ...]:
    """The names of the channels; nnU-Net calls them `channel_names`."""
    found = manifest.get("modality", manifest.get("channel_names", {"0": "CT"}))
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f'{folder / "dataset.json"}: `modality` must map channels to names, {{"0": "CT"}}; '
            f"found {found!r}"
        )
    return tuple(str(name) for name in found.values())


def _entries(folder: Path, manifest: dict) -> list[dict]:
    path = folder / "dataset.json"
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


def _patient_table(path: str | Path, names: list[str]) -> dict[str, str]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise ValueError(f"data.patients_csv: no such file: {path}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV in UTF-8: {error}") from None
    if not rows or not {"scan", "patient_id"} <= set(rows[0]):
        found = ",".join(rows[0]) if rows else "nothing"
        raise ValueError(f"{path}: expected the columns scan,patient_id; found {found}")
    table: dict[str, str] = {}
    for row in rows:
        name, patient = str(row["scan"]).strip(), _patient(row["patient_id"])
        if name.endswith(_SUFFIXES):
            name = scan_name(name)
        if not patient:
            raise ValueError(f"{path}: the scan {name} has no patient_id; give one to every scan")
        if table.setdefault(name, patient) != patient:
            raise ValueError(f"{path}: the scan {name} has two patients")
    unknown = [name for name in table if name not in names]
    if unknown:
        raise ValueError(f"{path}: no such scan in dataset.json: {_shorten(unknown)}")
    return table


def _patient(value: Any) -> str:
    """An identifier as text; empty where there is none."""
    return "" if value is None else str(value).strip()


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
