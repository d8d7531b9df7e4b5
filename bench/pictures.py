"""The pictures of the README: ratios to the ordinary step on logarithmic axes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import cases, rivals
from bench.parts.scaling import CURVES, point_of
from bench.results import Row

#: the same in every picture: colour and marker of a rival
_LOOKS = {
    rival.name: {"color": color, "marker": marker}
    for rival, color, marker in zip(
        rivals.PRIVATE,
        ("black", "C1", "C2", "C3", "C4", "C5", "C6"),
        ("D", "o", "s", "^", "v", "P", "X"),
        strict=True,
    )
}
_TICKS = (0.125, 0.25, 0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500)
#: of these, what is left where the axis spans more than a factor of ten
_WIDE_TICKS = (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_FIGURES = {
    "best_ratio": "time, ordinary step = 1",
    "memory_ratio": "peak memory growth, ordinary step = 1",
}


def steps(group: Sequence[Row], folder: Path, caption: str) -> Path:
    """A line per case, a mark per rival: time on the left, memory on the right."""
    pyplot = _pyplot()
    by_key = {(row.case, row.rival): row for row in group if row.status == "ok"}
    names = [case.name for case in cases.CASES if any(row.case == case.name for row in group)]
    shown = [r for r in rivals.PRIVATE if any((name, r.name) in by_key for name in names)]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 1.8 + 0.48 * len(names)), sharey=True)
    for axis, (value, label) in zip(axes, _FIGURES.items(), strict=True):
        for line, rival in reversed(list(enumerate(shown))):
            shift = 0.7 * ((line + 0.5) / len(shown) - 0.5)
            points = [
                (getattr(by_key[name, rival.name], value), index + shift)
                for index, name in enumerate(names)
                if (name, rival.name) in by_key and getattr(by_key[name, rival.name], value)
            ]
            size = 7 if rival.name == "ours" else 5
            _plot(axis, points, rival, linestyle="", markersize=size)
        axis.set_xscale("log")
        _ticks(axis.xaxis, axis.get_xlim())
        axis.axvline(1.0, color="black", linewidth=1)
        axis.grid(alpha=0.3, axis="x")
        for index in range(1, len(names), 2):
            axis.axhspan(index - 0.5, index + 0.5, color="black", alpha=0.05, linewidth=0)
        axis.set_xlabel(label)
    axes[0].set_yticks(range(len(names)), [cases.TITLES[name] for name in names], fontsize=9)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.suptitle(
        textwrap.fill(f"What a DP step costs (left is better). {caption}", 110), fontsize=10
    )
    figure.legend(handles[::-1], labels[::-1], loc="lower center", ncols=len(shown), fontsize=9)
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    first = group[0]
    device = first.device.lower().replace(" ", "-")
    return _save(figure, folder / f"steps-{device}-{first.threads}-{first.allocator}.png")


def scaling(rows: Sequence[Row], folder: Path) -> Path | None:
    """A pair per curve, time above and memory below; None without rows."""
    own = [row for row in rows if row.status == "ok" and point_of(row)[0] in CURVES]
    names = [name for name in CURVES if any(point_of(row)[0] == name for row in own)]
    if not names:
        return None
    pyplot = _pyplot()
    across = min(len(names), 4)
    down = -(-len(names) // across)
    figure, axes = pyplot.subplots(
        2 * down, across, figsize=(3.3 * across, 4.9 * down + 0.7), squeeze=False
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for index, name in enumerate(names):
        pair = axes[2 * (index // across) : 2 * (index // across) + 2, index % across]
        chosen = [r for r in rivals.PRIVATE if r.name in CURVES[name].rivals]
        for axis, (value, label) in zip(pair, _FIGURES.items(), strict=True):
            axis.set_visible(True)
            mine = [row for row in own if point_of(row)[0] == name]
            for rival in reversed(chosen):
                points = sorted(
                    (point_of(row)[1], getattr(row, value))
                    for row in mine
                    if row.rival == rival.name and getattr(row, value)
                )
                _plot(axis, points, rival, linewidth=1.3)
            axis.set_xscale("log", base=2)
            axis.set_xticks([x for x in CURVES[name].points if x in {point_of(r)[1] for r in mine}])
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.xaxis.minorticks_off()
            axis.set_yscale("log")
            axis.margins(y=0.15)
            _ticks(axis.yaxis, axis.get_ylim())
            axis.axhline(1.0, color="black", linewidth=1)
            axis.grid(alpha=0.3)
            if index % across == 0:
                axis.set_ylabel(label.replace(", ", ",\n"), fontsize=9)
        pair[0].set_title(CURVES[name].title.replace(" (", "\n("), fontsize=9)
    pairs = (zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes.flat)
    drawn = {title: handle for pair in pairs for handle, title in pair}
    order = [rival.title for rival in rivals.PRIVATE if rival.title in drawn]
    figure.legend([drawn[t] for t in order], order, loc="lower center", ncols=len(order))
    figure.suptitle("How a DP step scales, one thread of the CPU; lower is better", fontsize=11)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    return _save(figure, folder / "scaling.png")


def _plot(axis: Any, points: list[tuple[float, float]], rival: rivals.Rival, **style: Any) -> None:
    if points:
        looks = _LOOKS[rival.name]
        axis.plot(*zip(*points, strict=True), label=rival.title, **looks, **style)


def _ticks(axis: Any, limits: tuple[float, float]) -> None:
    low, high = min(limits[0], 0.9), max(limits[1], 1.1)
    axis.axes.set(**{"xlim" if axis.axis_name == "x" else "ylim": (low, high)})
    ticks = _WIDE_TICKS if high > 10.0 * low else _TICKS
    axis.set_ticks([t for t in ticks if low <= t <= high])
    axis.set_major_formatter("{x:g}")
    axis.set_tick_params(which="minor", length=0)
    axis.set_minor_formatter("")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    _pyplot().close(figure)
    return path
