"""What the device does in a step, kernel by kernel, ours beside the ordinary one.

One row per case, rival and kernel (``kind`` = ``kernel``; on a CPU the operators that no other one
calls): ``calls`` and ``us`` per step, ``share`` of the time of all of them; the longest by name,
the others together. And, all per step, rows of ``kind`` = ``time``:

* ``wall``: microseconds without the profiler; ``host``: until Python returns (GPU only);

and of ``kind`` = ``step``:

* ``busy``: microseconds in which the device is at work; ``share`` of ``wall``;
* ``kernels``, ``copies and fills``: how many, their microseconds and share;
* ``gaps``: pauses between two of them of more than 5 microseconds, under the profiler, which slows
  launches: how many, and their sum;
* ``waits``: how often the host waits for the device, and how long.

Where a step cannot run, the only name of its ``time`` or ``step`` is the reason.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch

from bench import cases, profiling, results, rivals, table, timing, work
from bench.part import How, Only, Part, Row, Todo
from bench.table import number

RIVALS = ("ordinary", "ours")
#: of a GPU: one of each kind of network
CASES = ("encoder-t512-d1024-b16", "unet3d-96-b2", "resnet18-224-b32")
#: (a rival's step, the device, the step's wall time in microseconds if known) -> its rows
Rows = Callable[[rivals.Trainer, torch.device, float | None], list[Row]]
_WARM_UP = 3
_CLOCKED = 5
_STEPS = 3
_NAMED = 60
#: kernels printed of a case
_SHOWN = 25
_GAP = 5e-6
_COPIES = ("Memcpy", "Memset")


def todo(how: How, case: Only = None) -> Todo:
    """Three cases of a GPU, or the small ones."""
    names = case or (CASES if how.device.type == "cuda" else ())
    return of_cases(cases.find([*names], "quick"), how)


def of_cases(wanted: Sequence[cases.Case], how: How) -> Todo:
    """All cases timed, then all profiled, since the profiler may leave launches slower."""
    kinds: dict[str, Rows] = {"time": _clocked, "step": _traced}
    items = {
        f"{case.name}, {kind}": partial(_measure, kind, rows, case, how)
        for kind, rows in kinds.items()
        for case in wanted
    }
    return Todo(items, how, show=lambda: show(_written(how)))


def _measure(
    kind: str, rows: Rows, case: cases.Case, how: How, report: work.Report
) -> Iterator[list[Row]]:
    """The `rows` of the ordinary step and of ours, or why there are none, as a name."""
    workload = case.build(how.device)
    for rival in rivals.find(list(RIVALS)):
        place = {"case": case.name, "rival": rival.name}
        if rival.name in report.ended:
            found = [_row(kind, report.ended[rival.name])]
        else:
            report(rival.name, 0.5)
            report.begin(rival.name)
            try:
                step = rival.prepare(workload, rivals.Privacy(1.0, 1.0))
                found = rows(step, how.device, _wall(how, place))
            except Exception as error:
                what = f"{case.name}, {rival.name}"
                found = [_row(kind, timing.refusal(error, how.device, what))]
        yield [{**place, **row} for row in found]


def _clocked(step: rivals.Trainer, device: torch.device, wall: float | None) -> list[Row]:
    """Times of a step without the profiler."""
    clock = timing.clock_for(device)
    for _ in range(_WARM_UP):
        step()
    times = [clock(step) for _ in range(_CLOCKED)]
    rows = [_row("time", "wall", 1.0, 1e6 * statistics.median(t.wall for t in times))]
    host = [t.host for t in times if t.host is not None]
    if host:
        rows.append(_row("time", "host", 1.0, 1e6 * statistics.median(host)))
    return rows


def _traced(step: rivals.Trainer, device: torch.device, wall: float | None) -> list[Row]:
    """What the device does in a step whose time is `wall` microseconds, if that is known."""
    seen = profiling.record(step, _STEPS, device)
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in seen.events:
        kernels[profiling.short(event.name)].append(event.end - event.begin)
    order = sorted(kernels, key=lambda name: -sum(kernels[name]))
    named = {name: kernels[name] for name in order[:_NAMED]}
    if rest := order[_NAMED:]:
        named[f"{len(rest)} others"] = [t for name in rest for t in kernels[name]]
    whole = sum(map(sum, kernels.values()))
    copies = [e for e in seen.events if e.name.startswith(_COPIES)]
    others = [e for e in seen.events if not e.name.startswith(_COPIES)]
    lengths = [[e.end - e.begin for e in events] for events in (others, copies)]

    def per_step(
        kind: str, name: str, times: list[float], of: float | None = None
    ) -> dict[str, object]:
        taken = sum(times)
        share = taken / of if of else None
        return _row(kind, name, len(times) / seen.steps, 1e6 * taken / seen.steps, share)

    busy = 1e6 * seen.busy
    return [
        _row("step", "busy", 1.0, busy, busy / wall if wall else None),
        per_step("step", "kernels", lengths[0], whole),
        per_step("step", "copies and fills", lengths[1], whole),
        per_step("step", "gaps", seen.gaps(_GAP)),
        per_step("step", "waits", seen.waits),
        *(per_step("kernel", name, times, whole) for name, times in named.items()),
    ]


def _row(
    kind: str,
    name: str,
    calls: float | None = None,
    us: float | None = None,
    share: float | None = None,
) -> dict[str, object]:
    return {"kind": kind, "name": name, "calls": calls, "us": us, "share": share}


def _written(how: How) -> list[dict[str, str]]:
    """The rows of this device."""
    device = how.here()["device"]
    return [row for row in table.read(how.output) if row["device"] == device]


def _wall(how: How, place: Mapping[str, str]) -> float | None:
    """Microseconds of a rival's step as an earlier item of this commit has written them."""
    wanted = {**place, "kind": "time", "name": "wall", "commit": results.commit()}
    for row in _written(how):
        if all(row[column] == value for column, value in wanted.items()):
            return number(row["us"])
    return None


def show(rows: list[dict[str, str]]) -> None:
    """Print, case by case, what the rows of `kind` time and step say, and the kernels of ours."""
    lines = [
        (row["case"], row["rival"], row["name"], row["calls"], row["us"], _share(row))
        for row in rows
        if row["kind"] != "kernel"
    ]
    heads = ("case", "rival", "what", "calls", "us", "share")
    work.say_table(heads, lines, "a step on the device")
    added = [
        (case, name, *(f"{figure:.0f}" for figure in figures))
        for case in dict.fromkeys(row["case"] for row in rows)
        for name, *figures in extra(row for row in rows if row["case"] == case)[:_SHOWN]
    ]
    work.say_table(("case", "kernel", "ordinary, us", "ours, us", "extra, us"), added)


def _share(row: Mapping[str, str]) -> str:
    share = number(row["share"])
    return "" if share is None else f"{share:.0%}"


def extra(rows: Iterable[Mapping[str, str]]) -> list[tuple[str, float, float, float]]:
    """Kernel, microseconds of the ordinary step and of ours, difference: the largest ones first."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["kind"] == "kernel":
            times.setdefault(row["name"], {})[row["rival"]] = float(row["us"])
    found = [(name, *(own.get(rival, 0.0) for rival in RIVALS)) for name, own in times.items()]
    return sorted(((n, a, b, b - a) for n, a, b in found), key=lambda line: -abs(line[3]))


PART = Part(
    "trace",
    "A step kernel by kernel, ours and the ordinary one: three cases of a GPU, or small ones.",
    ("device", "case", "rival", "kind", "name"),
    todo,
    within=("device", "case", "rival", "kind"),
    on_gpu=True,
)
