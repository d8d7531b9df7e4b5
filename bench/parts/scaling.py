"""Scaling curves: time and memory of a step against one quantity at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated

import typer

from bench import cases, harness, models, results, rivals, table, work
from bench.part import How, Part, Row, Todo

PLAN = harness.Plan(seconds=1.5, least=3, most=30)


@dataclass(frozen=True)
class Curve:
    """One quantity that grows while the rest stays.

    Attributes:
        title: the quantity and what stays.
        points: its values, ascending.
        case: value -> case.
        rivals: who is measured beside the ordinary step: ours and the best others.
    """

    title: str
    points: tuple[int, ...]
    case: Callable[[int], cases.Case]
    rivals: tuple[str, ...]

    def coarse(self) -> tuple[int, ...]:
        """Every second point, with the last."""
        return self.points[::-2][::-1]


def _perceptron(width: int) -> cases.Case:
    return cases.Case(
        "perceptron",
        "perceptron",
        "",
        partial(models.perceptron, 256, width, width, width, 10),
        partial(cases.labelled, (256,), 10, 32),
    )


_ON_SEQUENCES = ("ours", "loop", "ew")
_ON_VOLUMES = ("ours", "loop", "functorch")
CURVES: Mapping[str, Curve] = {
    "batch": Curve(
        "batch size (encoder, T=128, d=128)",
        (1, 2, 4, 8, 16, 32),
        lambda x: cases.encoder(128, 128, 2, x),
        _ON_SEQUENCES,
    ),
    "batch-volumes": Curve(
        "batch size (3D U-Net of 8 channels, 32³)",
        (1, 2, 4, 8),
        lambda x: cases.unet(32, x, base=8),
        _ON_VOLUMES,
    ),
    "side": Curve(
        "side of the volume (3D U-Net of 8 channels, B=2)",
        (16, 24, 32, 48, 64),
        lambda x: cases.unet(x, 2, base=8),
        _ON_VOLUMES,
    ),
    "length": Curve(
        "sequence length T (encoder, d=128, B=4)",
        (32, 64, 128, 256, 512, 1024),
        lambda x: cases.encoder(x, 128, 2, 4),
        _ON_SEQUENCES,
    ),
    "width": Curve(
        "width d (encoder, T=128, B=4)",
        (64, 128, 256, 512),
        lambda x: cases.encoder(128, x, 2, 4),
        _ON_SEQUENCES,
    ),
    "depth": Curve(
        "depth (encoder, T=64, d=128, B=8)",
        (1, 2, 4, 8, 16),
        lambda x: cases.encoder(64, 128, x, 8),
        _ON_SEQUENCES,
    ),
    "parameters": Curve(
        "width of a perceptron of three layers (0.02 to 9 million parameters, B=32)",
        (64, 128, 256, 512, 1024, 2048),
        _perceptron,
        ("ours", "ew", "ghost"),
    ),
}


def point_of(row: results.Row) -> tuple[str, int]:
    """Curve and value of a row, from its case."""
    curve, _, value = row.case.partition("=")
    return curve, int(value)


def todo(
    how: How,
    curve: Annotated[list[str] | None, typer.Option(help="Only this curve (repeatable).")] = None,
    coarse: Annotated[bool, typer.Option(help="Every second point.")] = False,
) -> Todo:
    """The points of the curves, their ends last, since these take longest."""
    table.require_known("curve", curve or (), CURVES)
    points = [
        (name, value)
        for name in curve or CURVES
        for value in (CURVES[name].coarse() if coarse else CURVES[name].points)
    ]
    points.sort(key=lambda p: CURVES[p[0]].points.index(p[1]) / len(CURVES[p[0]].points))
    return Todo({f"{n}={value}": partial(_measure, n, value, how) for n, value in points}, how)


def _measure(name: str, value: int, how: How, report: work.Report) -> Iterator[list[Row]]:
    curve = CURVES[name]
    case = replace(curve.case(value), name=f"{name}={value}")
    chosen = rivals.find(list(curve.rivals))
    rows = harness.measure(case, chosen, how.device, PLAN, report)
    yield [asdict(row) for row in rows]


PART = Part(
    "scaling",
    "Time and memory against batch, volume side, length, width, depth, parameters.",
    results.KEY,
    todo,
    seconds=180.0,
    arguments=("--coarse",),
)
