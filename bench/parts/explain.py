"""What the planner decides in every case: ``PrivacyEngine.explain()`` after one step, as rows.

One row per case and parameter: ``status`` ``ok``, its layer, strategy, backend, share of the work,
counted operations and bytes, why this strategy and why not the others. A case whose step fails has
one row with the reason as its status.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

import dpkernels
from bench import cases, rivals, timing, work
from bench.part import How, Only, Part, Row, Todo


def todo(how: How, case: Only = None) -> Todo:
    """Every case of a GPU, or the small ones."""
    return of_cases(cases.find(case or [], "gpu" if how.device.type == "cuda" else "quick"), how)


def of_cases(wanted: Sequence[cases.Case], how: How) -> Todo:
    """One private step of each case, and its plan."""

    def measure(case: cases.Case, report: work.Report) -> Iterator[list[Row]]:
        try:
            rows = planned(case, how.device)
        except Exception as error:
            rows = [{"status": timing.refusal(error, how.device, case.name)}]
        yield [{"case": case.name, **row} for row in rows]

    return Todo(
        {case.name: partial(measure, case) for case in wanted},
        how,
        lambda name, status: [{"case": name, "status": status}],
    )


def planned(case: cases.Case, device: torch.device) -> list[dict[str, object]]:
    """The rows of ``explain()`` after one step of the case."""
    engine = dpkernels.PrivacyEngine()
    rivals.ours(case.build(device), rivals.Privacy(1.0, 1.0), engine)()
    return [
        {
            "status": "ok",
            **row,
            "why_not": "; ".join(f"{n}: {w}" for n, w in row["why_not"].items()),
        }
        for row in engine.explain().rows
    ]


PART = Part(
    "explain",
    "What the planner decides in every case of a GPU, or in the small ones.",
    ("device", "case", "parameter", "shape"),
    todo,
    within=("device", "case"),
    on_gpu=True,
)
