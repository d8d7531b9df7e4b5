"""Every backend of every op, against what the device can do and what the library's own call costs.

    python -m bench ops                                   one thread of the CPU, float32
    python -m bench ops --device cuda --output OUT.csv    bfloat16, float32 with TF32 and without

One row per op, shape, precision and backend that can run it, the automatic choice first:

* ``status``: ``ok``, or why there are no figures;
* ``ms``: lower quartile of several calls: processor time on the CPU; on a GPU the time of a call
  right behind a flush of its cache;
* ``roofline_ms``: the least time that the call's bytes (each tensor once, in main memory) and
  floating-point operations allow at the peaks measured in the same run, ``share`` the one over the
  other: an op whose tensors fit into a cache can exceed 1;
* on the CPU, in the row of the automatic choice of a layer's per-sample gradients, the library's
  calls in turns with it: ``batch_ms`` for its weight gradient summed over the batch, what an
  ordinary step pays; of convolutions also ``grouped_ms`` and ``looped_ms``, its own per-sample
  gradients, and ``form``, the way that the CPU backend takes.

A backend that has ended the process is left out, with that as its status.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Annotated

import torch
import typer

from bench import calls, table, timing, work
from bench.calls import PRECISIONS, Call, Place
from bench.part import How, Part, Row, Todo
from bench.table import number
from dpkernels import ops

#: calls take turns, of so many seconds at least
TURNS = 5
TURN_SECONDS = 0.03
#: divides lengths and sides of a GPU's shapes under --quick
SHRINK = 8
#: shapes named in a line
_WORST = 3


@dataclass(frozen=True)
class Peaks:
    """What the device does at best: bytes per second of a stream, flops per second of a product."""

    bandwidth: float
    flops: float

    def figures(self, call: Call, seconds: float) -> dict[str, object]:
        """The columns of a call that takes so long."""
        by_memory, by_flops = call.bytes / self.bandwidth, call.flops / self.flops
        least = max(by_memory, by_flops)
        return {
            "ms": 1e3 * seconds,
            "bound": "memory" if by_memory >= by_flops else "arithmetic",
            "roofline_ms": 1e3 * least,
            "share": least / seconds,
            "gflops": 1e-9 * call.flops / seconds,
            "gbytes_per_s": 1e-9 * call.bytes / seconds,
            "peak_gflops": 1e-9 * self.flops,
            "peak_gbytes_per_s": 1e-9 * self.bandwidth,
        }


def lower_quartiles(
    functions: Mapping[str, Callable[[], object]], clock: timing.Clock
) -> dict[str, float]:
    """Lower quartile of each one's times, seconds; they take turns, after an untimed call each."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(TURNS):
        for name, function in functions.items():
            times[name] += one_turn(function, clock)
    return {name: sorted(taken)[len(taken) // 4] for name, taken in times.items()}


def one_turn(call: Callable[[], object], clock: timing.Clock) -> list[float]:
    """Processor time of calls on the CPU, time on a GPU."""
    times: list[float] = []
    end = time.monotonic() + TURN_SECONDS
    while not times or time.monotonic() < end:
        taken = clock(call)
        times.append(taken.wall if taken.processor is None else taken.processor)
    return times


def peaks(at: Place, clock: timing.Clock) -> Peaks:
    """Of this device in this precision: by ``a + b -> c`` and by a matrix product."""
    on_gpu = at.device.type == "cuda"
    values, side = (1 << 26, 8192) if on_gpu else (1 << 24, 1536)
    a, b, c = torch.ones(3, values, device=at.device)
    left, right = at.randn(side, side), at.randn(side, side)
    least = {"stream": lambda: torch.add(a, b, out=c), "product": lambda: left @ right}
    taken = lower_quartiles(least, clock)
    return Peaks(12.0 * values / taken["stream"], 2.0 * side**3 / taken["product"])


def todo(
    how: How,
    only: Annotated[str, typer.Option(help="Ops whose name contains this text.")] = "",
    quick: Annotated[
        bool, typer.Option(help="A GPU's shapes, shortened: shows that all of it runs.")
    ] = False,
) -> Todo:
    """Each op, shape and precision is an item, each backend a piece of it."""
    on_gpu = how.device.type == "cuda"
    suite, precisions = ("gpu", [*PRECISIONS]) if on_gpu or quick else ("cpu", ["float32"])
    clock = timing.CallClock(how.device) if on_gpu else timing.host_clock
    best = cache(partial(peaks, clock=clock))
    every = {
        f"{op} {shape} {precision}": ({"op": op, "shape": shape, "precision": precision}, make)
        for precision in precisions
        for (op, shape), make in calls.cases(suite).items()
        if only in op
    }

    def measure(name: str, report: work.Report) -> Iterator[list[Row]]:
        item, make = every[name]
        timing.allow_tf32(PRECISIONS[item["precision"]][1])
        torch.manual_seed(0)
        at = Place(how.device, item["precision"], SHRINK if quick else 1)
        peak, call = best(replace(at, shrink=1)), make(at)
        for rank, backend in enumerate(call.op.candidates(*call.arguments)):
            row: dict[str, object] = {**item, "backend": backend, "rank": rank}
            report(backend, 0.5)
            if status := _ended(report, item["op"], backend):
                yield [{**row, "status": status}]
                continue
            report.begin(backend)
            beside, form = ({}, None) if rank else (call.beside, call.form)
            try:
                with ops.use_backend(backend):
                    taken = lower_quartiles({"": call, **beside}, clock)
            except Exception as error:
                status = timing.refusal(error, how.device, f"{name}, {backend}")
                yield [{**row, "status": status}]
                continue
            row |= {"status": "ok", **peak.figures(call, taken.pop("")), "form": form}
            yield [row | {f"{library}_ms": 1e3 * t for library, t in taken.items()}]

    return Todo(
        {name: partial(measure, name) for name in every},
        how,
        lambda name, status: [{**every[name][0], "backend": "", "status": status}],
    )


def _ended(report: work.Report, op: str, backend: str) -> str | None:
    """Why a backend is not tried: it has ended a process, with this op on this shape or another.

    A kernel that never ends would else take its limit on every shape, and the others' time.
    """
    if backend in report.ended:
        return report.ended[backend]
    for name, ended in report.elsewhere.items():
        if backend in ended and name.startswith(f"{op} "):
            return f"not tried: it has ended the process on {name.removeprefix(op).strip()}"
    return None


def digest(rows: list[dict[str, str]]) -> list[str]:
    """What had no figures; then, by device and precision, ratios and shares of the roofline."""
    lines, groups = [], {}
    for row in rows:
        if row["status"] == "ok":
            groups.setdefault((row["device"], row["precision"]), []).append(row)
        else:
            what = (row["op"], row["shape"], row["precision"], row["backend"], row["status"])
            lines.append(" ".join(what))
    for (device, precision), group in groups.items():
        where = table.provenance(group)
        lines += [f"{device}, {precision}: {line} ({where})" for line in _said(group)]
    return lines


def _said(rows: list[dict[str, str]]) -> Iterator[str]:
    """Of one device and precision."""
    taken = [row for row in rows if row["rank"] == "0"]
    if ratios := sorted(
        ((ratio, row["shape"]) for row in taken if (ratio := _over_batch(row))), reverse=True
    ):
        most = ", ".join(f"{shape} {ratio:.2f}" for ratio, shape in ratios[:_WORST])
        yield (
            "per-sample gradients of a layer over the library's gradient of the batch: "
            f"{statistics.geometric_mean(ratio for ratio, _ in ratios):.2f} times its time in the "
            f"geometric mean of {len(ratios)} shapes; most: {most}."
        )
    best: dict[str, dict[str, tuple[float, str]]] = {}
    for row in rows:
        shapes = best.setdefault(row["op"], {})
        found = (float(row["share"]), row["backend"])
        shapes[row["shape"]] = max(shapes.get(row["shape"], found), found)
    every = [share for shapes in best.values() for share, _ in shapes.values()]
    yield (
        f"ops against the roofline ({float(rows[0]['peak_gflops']):.0f} GFLOP/s, "
        f"{float(rows[0]['peak_gbytes_per_s']):.0f} GB/s, measured in the same run), the best "
        f"backend on each shape: {statistics.median(every):.0%} in the median of {len(every)}; "
        + "; ".join(f"{op} {_range(shapes)}" for op, shapes in best.items())
        + "."
    )


def _range(shapes: Mapping[str, tuple[float, str]]) -> str:
    """From the least share to the largest, and the backends."""
    least, largest = min(shapes.values()), max(shapes.values())
    shares = f"{least[0]:.0%} to {largest[0]:.0%}" if len(shapes) > 1 else f"{least[0]:.0%}"
    return f"{shares} ({', '.join(sorted({backend for _, backend in shapes.values()}))})"


def tables(rows: list[dict[str, str]]) -> list[str]:
    """The CPU's automatic choices, a line a layer, and a line each of the other ops."""
    of_layers: dict[str, dict[str, str]] = {}
    others = []
    for row in _taken(rows):
        cell = f"{row['ms']} ms, {float(row['share']):.0%}"
        family, _, kind = row["op"].partition("_")
        if family in ("linear", "conv"):
            cells = of_layers.setdefault(row["shape"], {})
            cells[kind] = cell
            if ratio := _over_batch(row):
                cells["ratio"] = f"{ratio:.2f}"
        else:
            others.append((row["op"], row["shape"], cell))
    heads = ("layer", "norms", "gradients", "clipped sum", "gradients over the batch's one")
    columns = ("norm_sq", "grad_sample", "clipped_grad", "ratio")
    lines = [(shape, *(c.get(name, "–") for name in columns)) for shape, c in of_layers.items()]
    return [
        "Ops on one thread: time, and share of the roofline.",
        table.markdown(heads, lines, figures=4),
        table.markdown(("op", "shape", "time, share"), others, figures=1),
    ]


def _taken(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of rows those of the CPU's automatic choices."""
    return [r for r in rows if r["device"] == "cpu" and r["rank"] == "0" and r["status"] == "ok"]


def _over_batch(row: dict[str, str]) -> float | None:
    """Time over the library's for the gradient of the batch, where that was measured."""
    batch = number(row.get("batch_ms"))
    return float(row["ms"]) / batch if batch else None


PART = Part(
    "ops",
    "Every backend of every op against the roofline and the library's gradient of the batch.",
    ("device", "threads", "op", "shape", "precision", "backend"),
    todo,
    seconds=110.0,
    digest=digest,
    tables=tables,
    on_gpu=True,
    may_leave=True,
)
