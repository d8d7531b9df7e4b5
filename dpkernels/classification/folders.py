"""Folders of images in the layouts of public data sets: which image, of whom, which class."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
_HAM_TABLE = "HAM10000_metadata.csv"
_SHOWN = 5


@dataclass(frozen=True)
class Picture:
    """One image; `label` indexes the classes of its folder."""

    name: str
    patient_id: str
    path: Path
    label: int


@dataclass(frozen=True)
class ImageFolder:
    """What a data set holds.

    Attributes:
        root: the folder.
        classes: names, by label.
        pictures: in the order of the table, or sorted by path.
        unit: what the guarantee protects: "patient", "lesion" or "image".
        notes: sentences for the report.
    """

    root: Path
    classes: tuple[str, ...]
    pictures: tuple[Picture, ...]
    unit: str
    notes: tuple[str, ...]

    @property
    def patients(self) -> dict[str, tuple[Picture, ...]]:
        """Images by unit (patient, lesion or image), in the order of the data set."""
        groups: dict[str, list[Picture]] = {}
        for picture in self.pictures:
            groups.setdefault(picture.patient_id, []).append(picture)
        return {patient: tuple(found) for patient, found in groups.items()}


@dataclass(frozen=True)
class _Found:
    """Images before classes are numbered: (name, unit or "", path, class name)."""

    rows: list[tuple[str, str, Path, str]]
    unit: str
    notes: list[str]


def read_images(
    root: str | Path, *, layout: str = "auto", positive: Sequence[str] = (), patients_csv: str = ""
) -> ImageFolder:
    """Find the images of a data set, their classes and whom they show.

    Args:
        root: its folder.
        layout: see `config.ImageDataConfig`.
        positive: classes to tell from all others; empty: every class by itself.
        patients_csv: CSV with the columns image,patient_id; overrides what the layout says.

    Raises:
        ValueError: the folder, a table, a column or a listed image is missing; fewer than two
            classes; the message names the file, what was found and what is expected.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise ValueError(f"data.root must be a folder of images; {folder} is not a folder")
    found = _READERS[_layout_of(folder) if layout == "auto" else layout](folder)
    if not found.rows:
        raise ValueError(
            f"{folder}: no image found; expected files ending in {', '.join(_SUFFIXES)}"
        )
    _refuse_twins(folder, [row[0] for row in found.rows])
    unit, rows, notes = found.unit, found.rows, list(found.notes)
    if patients_csv:
        table = _patients(patients_csv, [row[0] for row in rows])
        rows = [(name, table[name], path, label) for name, _, path, label in rows]
        unit, notes = "patient", []
    if unit == "image":
        note = (
            "Nothing says which images show the same patient: every image was taken by itself. If "
            "a patient has several, the guarantee holds per image, not per patient: pass a CSV "
            "with the columns image,patient_id (--patients)."
        )
        warnings.warn(note, stacklevel=2)
        notes.append(note)
    classes, label_of = _classes(folder, sorted({row[3] for row in rows}), positive)
    pictures = tuple(
        Picture(name, patient or name, path, label_of[label]) for name, patient, path, label in rows
    )
    return ImageFolder(folder, classes, pictures, unit, tuple(notes))


def single_pictures(source: Path) -> list[Picture]:
    """An image file, or every one in a folder, without classes.

    Raises:
        ValueError: no image there.
    """
    if source.is_file():
        return [Picture(source.name, source.name, source, 0)]
    if not source.is_dir():
        raise ValueError(f"IN must be an image or a folder of images; {source} does not exist")
    paths = _images_below(source)
    if not paths:
        raise ValueError(f"IN must hold images ({', '.join(_SUFFIXES)}); {source} has none")
    return [Picture(str(p.relative_to(source)), p.name, p, 0) for p in paths]


def _layout_of(folder: Path) -> str:
    if (folder / _HAM_TABLE).is_file():
        return "ham10000"
    return "table" if _tables(folder) else "folders"


def _read_folders(folder: Path) -> _Found:
    """One folder per class."""
    rows = []
    for inner in sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] not in "._"):
        for path in _images_below(inner):
            rows.append((str(path.relative_to(folder)), "", path, inner.name))
    return _Found(rows, "image", [])


def _read_ham10000(folder: Path) -> _Found:
    """HAM10000_metadata.csv and the images it lists, in any folder below."""
    table = folder / _HAM_TABLE
    lines = _read_table(table, ("image_id", "lesion_id", "dx"))
    paths = {path.stem: path for path in _images_below(folder)}
    missing = [line["image_id"] for line in lines if line["image_id"] not in paths]
    if missing:
        raise ValueError(
            f"{table}: no image file below {folder} for {_shorten(missing)}; expected for example "
            f"HAM10000_images_part_1/{missing[0]}.jpg"
        )
    rows = [
        (line["image_id"], line["lesion_id"], paths[line["image_id"]], line["dx"]) for line in lines
    ]
    note = (
        "HAM10000 tells lesions apart, not patients: a patient with several lesions is protected "
        "for each of them, not for all together."
    )
    return _Found(rows, "lesion", [note])


def _read_tables(folder: Path) -> _Found:
    """CSV files with the columns filename,label and perhaps patient_id, as RadImageNet has."""
    tables = _tables(folder)
    if not tables:
        raise ValueError(f"{folder}: no CSV file with the columns filename,label found")
    rows, identified = [], True
    for table in tables:
        for line in _read_table(table, ("filename", "label")):
            path = folder / line["filename"]
            if not path.is_file():
                raise ValueError(f"{path}: no such file; {table} lists it")
            identified = identified and bool(line.get("patient_id"))
            rows.append((line["filename"], line.get("patient_id") or "", path, line["label"]))
    notes = [f"The tables {', '.join(t.name for t in tables)} were read as one data set."]
    return _Found(rows, "patient" if identified else "image", notes[: len(tables) - 1])


_READERS: dict[str, Callable[[Path], _Found]] = {
    "folders": _read_folders,
    "ham10000": _read_ham10000,
    "table": _read_tables,
}


def _tables(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8-sig") as file:
            columns = next(csv.reader(file), [])
        if {"filename", "label"} <= set(columns) and not path.name.startswith("._"):
            found.append(path)
    return found


def _read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a CSV with {','.join(columns)}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = list(csv.DictReader(file))
    if not lines or not set(columns) <= set(lines[0]):
        found = ",".join(lines[0]) if lines else "nothing"
        raise ValueError(f"{path}: expected the columns {','.join(columns)}; found {found}")
    for number, line in enumerate(lines, start=2):
        empty = [column for column in columns if not line[column]]
        if empty:
            raise ValueError(f"{path}: line {number} has no {empty[0]}")
    return lines


def _patients(path: str, names: list[str]) -> dict[str, str]:
    table = {
        line["image"]: line["patient_id"]
        for line in _read_table(Path(path), ("image", "patient_id"))
    }
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(f"{path}: no patient_id for {_shorten(missing)}; give one to every image")
    return table


def _classes(
    folder: Path, names: list[str], positive: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, int]]:
    unknown = [name for name in positive if name not in names]
    if unknown:
        raise ValueError(
            f"data.positive: {folder} has no class {_shorten(unknown)}; found {_shorten(names)}"
        )
    if len(names) < 2 or (positive and len(set(positive)) == len(names)):
        raise ValueError(f"{folder}: expected at least two classes, found {_shorten(names)}")
    if not positive:
        return tuple(names), {name: index for index, name in enumerate(names)}
    return ("other", "+".join(positive)), {name: int(name in positive) for name in names}


def _images_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith("._")
    )


def _refuse_twins(folder: Path, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{folder}: the image {name} is listed twice")
        seen.add(name)


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
