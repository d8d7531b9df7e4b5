"""CSV tables of which a rerun replaces its own rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, as text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def replace(path: Path, rows: Iterable[Mapping[str, object]], key: Sequence[str]) -> None:
    """Write `rows` in the place of those with the same values in the columns `key`.

    The file is replaced as a whole, so that an interrupted run leaves the former one. Columns that
    no new row has are kept only for the rows that stay.
    """
    texts = [{column: _text(value) for column, value in row.items()} for row in rows]
    merged = {_values(row, key): row for row in read(path)}
    merged.update({_values(row, key): row for row in texts})
    columns = list(dict.fromkeys(c for row in (*texts, *merged.values()) for c in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())
    partial.replace(path)


def number(text: str | None) -> float | None:
    """The number in a cell; None where it is empty."""
    return float(text) if text else None


def _values(row: Mapping[str, str], key: Sequence[str]) -> tuple[str, ...]:
    return tuple(row.get(column, "") for column in key)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
