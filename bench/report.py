"""The README's table and the pictures, from the rows and nothing else."""

from __future__ import annotations

import textwrap
from pathlib import Path

from bench import cases, rivals
from bench.results import Row

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_TITLES = {case.name: case.title for case in cases.CASES}
_COLUMNS = [rival for rival in rivals.RIVALS if rival.private]
#: ratios beyond are cut in the pictures, with their value written
_AXIS_END = 5.0
_NO_GPU = "GPU: not yet measured."


def markdown(rows: list[Row]) -> str:
    """One table per device, threads and allocator: step time over the ordinary one, then memory."""
    parts = [_table(group) for group in _groups(rows)]
    if not any(row.device != "cpu" for row in rows):
        parts.append(_NO_GPU)
    return "\n\n".join(parts)


def write(readme: Path, rows: list[Row]) -> bool:
    """Put the table between the markers of `readme`; False where it has no markers."""
    text = readme.read_text() if readme.exists() else ""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        return False
    readme.write_text(f"{head}{BEGIN}\n{markdown(rows)}\n{END}{tail}")
    return True


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
    found = []
    for name in _case_names(rows):
        ordinary = by_key.get((name, "ordinary"))
        cells = [_cell(by_key.get((name, rival.name))) for rival in _COLUMNS]
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
    missing = {
        row.rival: row.status for row in group if row.status != "ok" and row.rival != "ordinary"
    }
    if not missing:
        return ""
    return "\n\nA dash: not measured, or the rival cannot run the case (the rows say why)."


def _cell(row: Row | None) -> str:
    if row is None or row.status != "ok" or row.best_ratio is None:
        return "–"
    memory = "" if row.memory_ratio is None else f" / {row.memory_ratio:.2f}"
    return f"{row.best_ratio:.2f}{memory}"


def _milliseconds(row: Row | None) -> str:
    return "–" if row is None or row.best_ms is None else f"{row.best_ms:.0f} ms"
