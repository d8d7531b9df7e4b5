"""Who is in a data set: its records by patient, and who says which record is whose. No torch."""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

_SHOWN = 5


class Identified(Protocol):
    """A record of a data set: a scan, an image."""

    @property
    def name(self) -> str:
        """Of the record, unique in its data set."""

    @property
    def patient_id(self) -> str:
        """Whose it is; what the guarantee protects."""


Record = TypeVar("Record", bound=Identified)


@dataclass(frozen=True)
class Cohort(Generic[Record]):
    """What a data set holds.

    Attributes:
        root: its folder.
        records: in the order of the data set.
        unit: what a `patient_id` tells apart: "patient", "lesion", or the record itself.
        notes: sentences for the report (grouping assumed, files skipped).
    """

    root: Path
    records: tuple[Record, ...]
    unit: str
    notes: tuple[str, ...]

    @property
    def patients(self) -> dict[str, tuple[Record, ...]]:
        """Records by `patient_id`, both in the order of the data set."""
        groups: dict[str, list[Record]] = {}
        for record in self.records:
            groups.setdefault(record.patient_id, []).append(record)
        return {patient: tuple(records) for patient, records in groups.items()}


def assign_patients(
    own: Sequence[tuple[str, str]],
    unit: str,
    patients_csv: str | Path,
    *,
    record: str,
    source: str | Path,
    name_of: Callable[[str], str] = str,
) -> tuple[list[str], str, tuple[str, ...]]:
    """Say whose each record is.

    Args:
        own: name of each record, and the identifier that the data set itself gives it, or "".
        unit: what those identifiers tell apart; `record` where they are the records' own.
        patients_csv: CSV with the columns `record`,patient_id, which wins; "": none.
        record: what a record is called.
        source: file or folder that lists the records.
        name_of: from what the table calls a record to its name.

    Returns:
        The identifier of each record, what it tells apart, and notes for the report. Where nobody
        says whose the records are, each is taken by itself, with a warning.

    Raises:
        ValueError: two records of one name, a record without an identifier among others with one,
            or a faulty table.
    """
    names = [name for name, _ in own]
    twins = [name for name, count in Counter(names).items() if count > 1]
    if twins:
        raise ValueError(f"{source}: the {record} {twins[0]} is listed twice")
    known = dict(own)
    if patients_csv:
        known, unit = _patient_table(patients_csv, record, name_of), "patient"
    missing = [name for name in names if not known.get(name)]
    if missing and any(known.values()):
        others = [name for name in known if name not in names]
        hint = f". There is no such {record}: {shorten(others)}" if others else ""
        raise ValueError(
            f"{patients_csv or source}: no patient_id for {shorten(missing)}; give one to every "
            f"{record}{hint}"
        )
    if not missing and unit != record:
        return [known[name] for name in names], unit, ()
    note = (
        f"Nothing says which {record}s show the same patient: every {record} was taken by itself. "
        f"If a patient has several, the guarantee holds per {record}, not per patient: pass a CSV "
        f"with the columns {record},patient_id (--patients)."
    )
    warnings.warn(note, stacklevel=3)
    return [known[name] or name for name in names], record, (note,)


def _patient_table(path: str | Path, record: str, name_of: Callable[[str], str]) -> dict[str, str]:
    table: dict[str, str] = {}
    for line in read_table(path, (record, "patient_id")):
        name, patient = name_of(line[record]), line["patient_id"]
        if table.setdefault(name, patient) != patient:
            raise ValueError(f"{path}: the {record} {name} has two patients")
    return table


def read_table(path: str | Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The lines of a CSV with named columns; spaces around a value are dropped.

    Raises:
        ValueError: the file or a column is missing, a value of these columns is empty, or it is
            not a CSV in UTF-8; the message names the file and the line.
    """
    expected = ",".join(columns)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected a CSV with {expected}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV in UTF-8: {error}") from None
    if not lines or not set(columns) <= set(lines[0]):
        found = ",".join(lines[0]) if lines else "nothing"
        raise ValueError(f"{path}: expected the columns {expected}; found {found}")
    table = [{key: (value or "").strip() for key, value in line.items() if key} for line in lines]
    for number, line in enumerate(table, start=2):
        empty = [column for column in columns if not line[column]]
        if empty:
            raise ValueError(f"{path}: line {number} has no {empty[0]}")
    return table


def shorten(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
