"""The README's table and the one of the notes, from the rows and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench import cases, pictures, results, rivals, table, targets
from bench.part import Part
from bench.parts import scaling
from bench.results import Row

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_MARK = "*"
#: where asterisks mean something
_ESCAPED = "\\*"
_MORE = (
    "Kernels against the roofline, accountants, the noise's law, and where each strategy takes "
    "over: [bench/NOTES.md](bench/NOTES.md)."
)
#: milliseconds
_TENTHS_BELOW = 10.0
_NO_GPU = "GPU: not yet measured."


def write_all(root: Path, parts: Sequence[Part]) -> list[Path]:
    """Pictures, the README's block and the one of the notes, from the committed rows of all parts.

    Raises:
        ValueError: a file without the markers.
    """
    rows = results.read(results.RESULTS / "steps.csv")
    drawn = [
        pictures.steps(group, results.RESULTS, _caption(group))
        for group in _groups(rows)
        if not _kept(group)
    ]
    if curves := pictures.scaling(results.read(scaling.PART.path), results.RESULTS):
        drawn.append(curves)
    shown = [f"![{path.stem}]({path.relative_to(root)})" for path in drawn]
    lines = {part: part.said(part.digest) for part in parts}
    headlines = [found[0] for part, found in lines.items() if part.headline and found]
    listed = _listed([line for found in lines.values() for line in found])
    noted = [text for part in parts for text in part.said(part.tables)]
    on_gpu = "" if any(row.device != "cpu" for row in rows) else _NO_GPU
    texts = {
        root / "README.md": [*tables(rows), *shown, _listed(headlines), _MORE, on_gpu],
        root / "bench" / "NOTES.md": [outcome_table(rows), listed, *noted],
    }
    for path, paragraphs in texts.items():
        write(path, "\n\n".join(text for text in paragraphs if text))
    return [*drawn, *texts]


def tables(rows: list[Row]) -> list[str]:
    """One per device, threads and allocator: step time over the ordinary one, then memory."""
    return [_table(group) for group in _groups(rows)]


def outcome_table(rows: list[Row]) -> str:
    """What was wanted, predicted and found, case by case, on one thread of the CPU."""
    wanted = targets.read()
    group = [row for row in rows if row.key[:3] == ("cpu", "1", "system")]
    missed = targets.missed(group, wanted)
    lines = []
    own = {row.case: row for row in group if row.rival == "ours"}
    for name in _case_names(group):
        if row := own.get(name):
            target = wanted.get(name)
            goal = f"{_ratio(target.time)} / {_ratio(target.memory)}" if target else "–"
            predicted = target.predicted if target else "–"
            why = str(missed.get(name, ""))
            lines.append((cases.TITLES[name], goal, predicted, _cell(row), why))
    shown = table.markdown(("case", "target", "predicted", "outcome", "not met"), lines)
    return "\n".join([shown, *_explained(list(missed.values()))])


def write(path: Path, text: str) -> None:
    """Put `text` between the markers of a file.

    Raises:
        ValueError: the file has no markers.
    """
    old = path.read_text() if path.exists() else ""
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: expected a line {BEGIN} and a line {END}")
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


def lines(rows: list[Row], strong: str = "") -> list[tuple[str, ...]]:
    """Case, ordinary milliseconds and one cell per private rival.

    Args:
        strong: put before and after the figures of the fastest private rival of a case.
    """
    by_key = {(row.case, row.rival): row for row in rows}
    marked = targets.missed(rows, targets.read())
    found = []
    for name in _case_names(rows):
        ordinary = by_key.get((name, "ordinary"))
        own = [by_key.get((name, rival.name)) for rival in rivals.PRIVATE]
        cells = [_cell(row) for row in own]
        times = [row.best_ratio for row in own if row and row.best_ratio is not None]
        for index, row in enumerate(own):
            if row and times and row.best_ratio == min(times):
                cells[index] = f"{strong}{cells[index]}{strong}"
        if name in marked:
            cells[0] += _ESCAPED if strong else _MARK
        found.append((cases.TITLES[name], _milliseconds(ordinary), *cells))
    return found


def heads() -> tuple[str, ...]:
    """Column titles of :func:`lines`."""
    return ("case", "ordinary step", *(rival.title for rival in rivals.PRIVATE))


def _groups(rows: list[Row]) -> list[list[Row]]:
    keys = sorted({(row.device != "cpu", *row.key[:3]) for row in rows})
    # "kept" after "system": the allocator that users have unless they ask for another comes first
    keys.sort(key=lambda key: (key[0], key[3] == "kept"))
    return [[row for row in rows if row.key[:3] == key[1:]] for key in keys]


def _case_names(rows: list[Row]) -> list[str]:
    present = {row.case for row in rows}
    return [case.name for case in cases.CASES if case.name in present]


def _table(group: list[Row]) -> str:
    text = table.markdown(heads(), lines(group, strong="**"), figures=len(heads()) - 1)
    parts = [f"**{_caption(group)}**", _key(group), text, *_summary(group), *_misses(group)]
    return "\n\n".join(parts)


def _caption(group: list[Row]) -> str:
    first = group[0]
    threads = "one thread" if first.threads == 1 else f"{first.threads} threads"
    # rows of rivals that a run leaves out may be of another machine than the rest
    processors = " and ".join(dict.fromkeys(row.cpu for row in group))
    where = f"CPU: {threads} of {processors}"
    if first.device != "cpu":
        where = f"GPU: {first.device}"
    kept = ", freed memory kept by the process (as jemalloc does)" if _kept(group) else ""
    return f"{where}{kept}, torch {' and '.join(dict.fromkeys(row.torch for row in group))}"


def _key(group: list[Row]) -> str:
    time = "processor time" if any(row.by_processor for row in group) else "time"
    return (
        f"Cells: {time} of a DP step / its peak memory growth, as multiples of those of the "
        "ordinary step of the same network and batch (1.00: privacy costs nothing). Bold: the "
        "fastest DP step of the case. A dash: not measured, or the rival cannot run the case (the "
        "rows in `bench/results/steps.csv` say why, and how each rival is set up). "
        f"{table.provenance(map(asdict, group))}."
    )


def _kept(group: list[Row]) -> bool:
    return group[0].allocator == "kept"


def _summary(group: list[Row]) -> list[str]:
    """In how many cases ours is the fastest, and which rival is ahead elsewhere."""
    first, level, behind = 0, [], []
    for row in group:
        rival = targets.fastest_rival(row.case, group)
        if row.rival != "ours" or not row.best_ratio or not rival or not rival.best_ratio:
            continue
        ratios = f"{rival.best_ratio:.2f} for {row.best_ratio:.2f}"
        title = cases.TITLES.get(row.case, row.case)
        name = f"{title} ({rivals.TITLES[rival.rival]} {ratios})"
        if row.best_ratio <= rival.best_ratio:
            first += 1
        elif row.best_ratio * (1.0 - targets.NOISE) <= rival.best_ratio:
            level.append(name)
        else:
            behind.append(name)
    total = first + len(level) + len(behind)
    if not total:
        return []
    text = f"dpkernels is the fastest DP step in {first} of {total} cases"
    if level:
        text += f", level (within {targets.NOISE:.0%}) in: {'; '.join(level)}"
    return [text + (f"; slower in: {'; '.join(behind)}." if behind else ".")]


def _misses(group: list[Row]) -> list[str]:
    missed = targets.missed(group, targets.read())
    names = [name for name in _case_names(group) if name in missed]
    if not names:
        return []
    listed = [f"- {cases.TITLES[name]}: {missed[name]}." for name in names]
    head = f"{_ESCAPED} above target, or slower than a rival:"
    return ["\n".join([head, "", *listed, *_explained(list(missed.values()))])]


def _explained(missed: list[targets.Miss]) -> list[str]:
    """The shared reasons that these name, each once."""
    used = dict.fromkeys(reason for miss in missed for reason in miss.reasons)
    known = targets.reasons()
    lines = [f"- *{name}*: {known[name]}." for name in used if name in known]
    return ["", "Reasons that several cases share:", "", *lines] if lines else []


def _listed(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _cell(row: Row | None) -> str:
    if row is None or row.status != "ok" or row.best_ratio is None:
        return "–"
    memory = "" if row.memory_ratio is None else f" / {row.memory_ratio:.2f}"
    return f"{row.best_ratio:.2f}{memory}"


def _milliseconds(row: Row | None) -> str:
    if row is None or row.best_ms is None:
        return "–"
    return f"{row.best_ms:.0f} ms" if row.best_ms >= _TENTHS_BELOW else f"{row.best_ms:.1f} ms"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
