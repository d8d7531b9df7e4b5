"""The README's table and the pictures, from the rows and nothing else."""

from __future__ import annotations

import textwrap
from pathlib import Path

from bench import cases, digest, results, rivals, scaling, targets
from bench.results import Row

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_MARK = "*"
_TITLES = {case.name: case.title for case in cases.CASES}
_COLUMNS = [rival for rival in rivals.RIVALS if rival.private]
#: ratios beyond are cut in the pictures, with their value written
_AXIS_END = 5.0
_NO_GPU = "GPU: not yet measured."


def write_all(root: Path, rows: list[Row]) -> list[Path]:
    """Pictures, the README's block and the one of the notes, from `rows` of steps and all others.

    Raises:
        ValueError: a file without the markers.
    """
    pictures = plot(rows, results.RESULTS)
    curves = scaling.plot(results.read(scaling.PATH), results.RESULTS)
    pictures += [curves] if curves else []
    shown = [f"![{path.stem}]({path.relative_to(root)})" for path in pictures]
    others = [f"- {line}" for line in digest.all_lines()]
    parts = [*tables(rows), "\n".join(others), *shown, *_no_gpu(rows)]
    texts = {
        root / "README.md": "\n\n".join(part for part in parts if part),
        root / "bench" / "NOTES.md": outcome_table(rows),
    }
    for path, text in texts.items():
        write(path, text)
    return [*pictures, *texts]


def tables(rows: list[Row]) -> list[str]:
    """One per device, threads and allocator: step time over the ordinary one, then memory."""
    return [_table(group) for group in _groups(rows)]


def outcome_table(rows: list[Row]) -> str:
    """What was wanted, predicted and found, case by case, on one thread of the CPU."""
    wanted = targets.read()
    group = [row for row in rows if row.key[:3] == ("cpu", "1", "system")]
    missed = targets.missed(group, wanted)
    lines = ["| case | target | predicted | outcome | not met |", "|---|---|---|---|---|"]
    own = {row.case: row for row in group if row.rival == "ours"}
    for name in _case_names(group):
        if row := own.get(name):
            target = wanted.get(name)
            goal = f"{_ratio(target.time)} / {_ratio(target.memory)}" if target else "–"
            predicted = target.predicted if target else "–"
            cells = (_TITLES[name], goal, predicted, _cell(row), missed.get(name, ""))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """One picture per device, threads and allocator: bars of time and memory by case and rival."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for group in _groups(rows):
        names = _case_names(group)
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 1.2 + 0.75 * len(names)), sharey=True)
        by_key = {(r.case, r.rival): r for r in group if r.status == "ok"}
        shown = [r for r in _COLUMNS if any((n, r.name) in by_key for n in names)]
        height = 0.8 / max(len(shown), 1)
        for axis, value, label in zip(
            axes, ("best_ratio", "memory_ratio"), ("time", "peak memory growth"), strict=True
        ):
            for index, rival in enumerate(shown):
                own = [(i, by_key.get((name, rival.name))) for i, name in enumerate(names)]
                points = [(i, r) for i, r in own if r and getattr(r, value) is not None]
                axis.barh(
                    [i + (index - len(shown) / 2 + 0.5) * height for i, _ in points],
                    [getattr(r, value) for _, r in points],
                    height,
                    color=f"C{index}",
                    label=rival.title,
                )
                for i, r in points:
                    if getattr(r, value) > _AXIS_END:
                        y = i + (index - len(shown) / 2 + 0.5) * height
                        text = f"{getattr(r, value):.0f} "
                        axis.text(_AXIS_END, y, text, fontsize=6, ha="right", va="center")
            axis.set_xlim(0, _AXIS_END)
            axis.axvline(1.0, color="black", linewidth=1)
            axis.set_xlabel(f"{label}, ordinary step = 1")
        axes[0].set_yticks(range(len(names)), [_TITLES.get(n, n) for n in names], fontsize=8)
        axes[0].invert_yaxis()
        axes[1].legend(fontsize=8)
        figure.suptitle(textwrap.fill(_caption(group), 150), fontsize=8)
        figure.tight_layout()
        first = group[0]
        device = first.device.lower().replace(" ", "-")
        written.append(folder / f"steps-{device}-{first.threads}-{first.allocator}.png")
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(written[-1], dpi=110)
        pyplot.close(figure)
    return written


def lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """Case, ordinary milliseconds and one cell per private rival: for tables in a terminal."""
    by_key = {(row.case, row.rival): row for row in rows}
    marked = targets.missed(rows, targets.read())
    found = []
    for name in _case_names(rows):
        ordinary = by_key.get((name, "ordinary"))
        cells = [_cell(by_key.get((name, rival.name))) for rival in _COLUMNS]
        if name in marked:
            cells[0] += _MARK
        found.append((_TITLES.get(name, name), _milliseconds(ordinary), *cells))
    return found


def heads() -> tuple[str, ...]:
    """Column titles of :func:`lines`."""
    return ("case", "ordinary step", *(rival.title for rival in _COLUMNS))


def _groups(rows: list[Row]) -> list[list[Row]]:
    keys = sorted({(row.device != "cpu", *row.key[:3]) for row in rows})
    return [[row for row in rows if row.key[:3] == key[1:]] for key in keys]


def _case_names(rows: list[Row]) -> list[str]:
    present = {row.case for row in rows}
    return [case.name for case in cases.CASES if case.name in present]


def _table(group: list[Row]) -> str:
    body = [heads(), tuple("---" if not i else "---:" for i in range(len(heads())))]
    body += lines(group)
    table = "\n".join("| " + " | ".join(line) + " |" for line in body)
    return f"{_caption(group)}\n\n{table}{_notes(group)}"


def _caption(group: list[Row]) -> str:
    first = group[0]
    on_cpu = first.device == "cpu"
    where = f"{first.threads} thread(s) of {first.cpu}" if on_cpu else first.device
    kept = ", freed memory kept by the process" if first.allocator == "kept" else ""
    time = "Processor time" if any(row.by_processor for row in group) else "Time"
    dates = sorted({row.date for row in group})
    commits = sorted({row.commit for row in group})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"{time} / peak memory growth of a DP step over those of the ordinary step: {where}{kept}, "
        f"torch {first.torch}, {span}, commit {', '.join(commits)}."
    )


def _notes(group: list[Row]) -> str:
    notes = []
    if any(row.status != "ok" for row in group if row.rival != "ordinary"):
        notes.append("A dash: not measured, or the rival cannot run the case (the rows say why).")
    missed = targets.missed(group, targets.read())
    if missed:
        names = [name for name in _case_names(group) if name in missed]
        listed = [f"- {_TITLES[name]}: {missed[name]}." for name in names]
        notes.append("\n".join([f"\\{_MARK} above target, or slower than a rival:", "", *listed]))
    return "".join(f"\n\n{note}" for note in notes)


def _no_gpu(rows: list[Row]) -> list[str]:
    return [] if any(row.device != "cpu" for row in rows) else [_NO_GPU]


def _cell(row: Row | None) -> str:
    if row is None or row.status != "ok" or row.best_ratio is None:
        return "–"
    memory = "" if row.memory_ratio is None else f" / {row.memory_ratio:.2f}"
    return f"{row.best_ratio:.2f}{memory}"


def _milliseconds(row: Row | None) -> str:
    return "–" if row is None or row.best_ms is None else f"{row.best_ms:.0f} ms"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
