"""Folders of images in the layouts of public data sets: which image, of whom, which class."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpkernels.training.cohort import Cohort, assign_patients, read_table, shorten

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
_HAM_TABLE = "HAM10000_metadata.csv"


@dataclass(frozen=True)
class Picture:
    """One image; `label` indexes the classes of its folder."""

    name: str
    patient_id: str
    path: Path
    label: int


@dataclass(frozen=True)
class ImageFolder(Cohort[Picture]):
    """What a data set holds.

    Attributes:
        classes: names, by label.
    """

    classes: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What a layout finds in a folder.

    Attributes:
        rows: of each image its name, whose it is (or ""), its file and the name of its class.
        unit: what the second of them tells apart: "patient", "lesion", "image".
        notes: sentences for the report.
    """

    rows: list[tuple[str, str, Path, str]]
    unit: str
    notes: tuple[str, ...] = ()


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
    fitting = (name for name, form in LAYOUTS.items() if form.fits(folder))
    found = LAYOUTS[next(fitting) if layout == "auto" else layout].read(folder)
    if not found.rows:
        raise ValueError(
            f"{folder}: no image found; expected files ending in {', '.join(_SUFFIXES)}"
        )
    own = [(name, patient) for name, patient, _, _ in found.rows]
    patients, unit, notes = assign_patients(
        own, found.unit, patients_csv, record="image", source=folder
    )
    classes, label_of = _classes(folder, sorted({row[3] for row in found.rows}), positive)
    pictures = tuple(
        Picture(name, patient, path, label_of[label])
        for (name, _, path, label), patient in zip(found.rows, patients, strict=True)
    )
    kept = () if patients_csv else found.notes
    return ImageFolder(folder, pictures, unit, (*kept, *notes), classes)


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


def _read_folders(folder: Path) -> Found:
    """One folder per class."""
    rows = []
    for inner in sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] not in "._"):
        for path in _images_below(inner):
            rows.append((str(path.relative_to(folder)), "", path, inner.name))
    return Found(rows, "image")


def _read_ham10000(folder: Path) -> Found:
    """HAM10000_metadata.csv and the images it lists, in any folder below."""
    table = folder / _HAM_TABLE
    lines = read_table(table, ("image_id", "lesion_id", "dx"))
    paths = {path.stem: path for path in _images_below(folder)}
    missing = [line["image_id"] for line in lines if line["image_id"] not in paths]
    if missing:
        raise ValueError(
            f"{table}: no image file below {folder} for {shorten(missing)}; expected for example "
            f"HAM10000_images_part_1/{missing[0]}.jpg"
        )
    rows = [
        (line["image_id"], line["lesion_id"], paths[line["image_id"]], line["dx"]) for line in lines
    ]
    note = (
        "HAM10000 tells lesions apart, not patients: a patient with several lesions is protected "
        "for each of them, not for all together."
    )
    return Found(rows, "lesion", (note,))


def _read_tables(folder: Path) -> Found:
    """CSV files with the columns filename,label and perhaps patient_id, as RadImageNet has."""
    tables = _tables(folder)
    if not tables:
        raise ValueError(f"{folder}: no CSV file with the columns filename,label found")
    rows, identified = [], True
    for table in tables:
        for line in read_table(table, ("filename", "label")):
            path = folder / line["filename"]
            if not path.is_file():
                raise ValueError(f"{path}: no such file; {table} lists it")
            identified = identified and bool(line.get("patient_id"))
            patient = line.get("patient_id") or line["filename"]
            rows.append((line["filename"], patient, path, line["label"]))
    notes = (f"The tables {', '.join(t.name for t in tables)} were read as one data set.",)
    return Found(rows, "patient" if identified else "image", notes[: len(tables) - 1])


@dataclass(frozen=True)
class Layout:
    """A way to lay out a data set.

    Attributes:
        fits: whether a folder looks like it.
        read: finds the images.
    """

    fits: Callable[[Path], bool]
    read: Callable[[Path], Found]


#: by name, in the order in which "auto" tries them; the last fits every folder
LAYOUTS: dict[str, Layout] = {
    "ham10000": Layout(lambda folder: (folder / _HAM_TABLE).is_file(), _read_ham10000),
    "table": Layout(lambda folder: bool(_tables(folder)), _read_tables),
    "folders": Layout(lambda folder: True, _read_folders),
}


def _tables(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8-sig") as file:
            columns = next(csv.reader(file), [])
        if {"filename", "label"} <= set(columns) and not path.name.startswith("._"):
            found.append(path)
    return found


def _classes(
    folder: Path, names: list[str], positive: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, int]]:
    unknown = [name for name in positive if name not in names]
    if unknown:
        raise ValueError(
            f"data.positive: {folder} has no class {shorten(unknown)}; found {shorten(names)}"
        )
    if len(names) < 2 or (positive and len(set(positive)) == len(names)):
        raise ValueError(f"{folder}: expected at least two classes, found {shorten(names)}")
    if not positive:
        return tuple(names), {name: index for index, name in enumerate(names)}
    return ("other", "+".join(positive)), {name: int(name in positive) for name in names}


def _images_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith("._")
    )
