"""CSV tables of which a rerun replaces its own rows."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, as text; none where there is no file.

    Raises:
        ValueError: a row with more cells than columns, as by a comma without quotes.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, restkey=""))
    for number, row in enumerate(rows, start=2):
        if "" in row:
            raise ValueError(f"{path}, row {number}: expected {len(row) - 1} cells (quote commas)")
    return rows


def replace(
    path: Path,
    rows: Iterable[Mapping[str, object]],
    key: Sequence[str],
    within: Sequence[str] = (),
) -> None:
    """Write `rows` in the place of those with the same values in the columns `key`.

    Where columns `within` are named, former rows that agree with a new one there go too.
    The file is replaced as a whole, so that an interrupted run leaves the former one. Columns that
    no new row has are kept only for the rows that stay.
    """
    texts = [{column: _text(value) for column, value in row.items()} for row in rows]
    renewed = {_values(row, within) for row in texts} if within else set()
    former = (row for row in read(path) if _values(row, within) not in renewed)
    merged = {_values(row, key): row for row in former}
    merged.update({_values(row, key): row for row in texts})
    columns = list(dict.fromkeys(c for row in (*texts, *merged.values()) for c in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())
    partial.replace(path)


def provenance(rows: Iterable[Mapping[str, str]]) -> str:
    """When and from which commits `rows` are: the commit of most of them first."""
    rows = list(rows)
    dates = sorted({row["date"] for row in rows if row.get("date")})
    counts = Counter(row["commit"] for row in rows if row.get("commit"))
    when = dates[:1] if len(dates) < 2 else [f"{dates[0]} to {dates[-1]}"]
    (commit, most), *others = counts.most_common() or [("", 0)]
    where = [f"commit {commit}"] if commit else []
    if others:
        rest = ", ".join(name for name, _ in others)
        where = [f"commit {commit} ({most} of {len(rows)} rows; the others: {rest})"]
    return ", ".join([*when, *where])


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]], figures: int = 0) -> str:
    """A table in Markdown, whose last columns, `figures` of them, are set to the right."""
    rules = ["---"] * (len(heads) - figures) + ["---:"] * figures
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rules, *lines))


def require_known(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Every one of `names` is among those known.

    Raises:
        ValueError: one is not; the message says which ones are.
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{kind} {name!r}: expected one of {', '.join(known)}")


def number(text: str | None) -> float | None:
    """The number in a cell; None where it is empty."""
    return float(text) if text else None


def _values(row: Mapping[str, str], key: Sequence[str]) -> tuple[str, ...]:
    return tuple(row.get(column, "") for column in key)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
