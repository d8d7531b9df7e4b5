"""What the planner decides in every case: ``PrivacyEngine.explain()`` after one step, as rows.

One row per case and parameter: ``status`` ``ok``, its layer, strategy, backend, share of the work,
counted operations and bytes, why this strategy and why not the others. A case whose step fails has
one row with the reason as its status.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import dpkernels
from bench import cases, harness, results, rivals, table, timing, work

KEY = ("device", "case", "parameter", "shape")


def run(
    wanted: Sequence[cases.Case],
    device: torch.device,
    path: Path,
    *,
    fresh: bool = False,
    budget: float | None = None,
    piece_seconds: float | None = None,
) -> work.Outcome:
    """Take one private step of each case and write its plan; case by case."""
    timing.allow_tf32(False)
    warnings.simplefilter("ignore")
    here = asdict(results.Environment.here(device, "system"))

    def write(name: str, rows: list[dict[str, object]]) -> None:
        table.replace(path, [{"case": name, **r, **here} for r in rows], KEY, ("device", "case"))

    def measure(case: cases.Case, report: work.Report) -> None:
        try:
            rows = planned(case, device)
        except Exception as error:
            timing.require_working(device, f"{case.name}: {error}")
            rows = [{"status": f"cannot run: {harness.one_line(error)}"}]
        write(case.name, rows)

    return work.off(
        {case.name: partial(measure, case) for case in wanted},
        f"explain-{device.type}",
        {"cases": [case.name for case in wanted], "output": str(path)},
        fresh=fresh,
        budget=budget,
        piece_seconds=piece_seconds,
        lost=lambda name, status: write(name, [{"status": status}]),
    )


def planned(case: cases.Case, device: torch.device) -> list[dict[str, object]]:
    """The rows of ``explain()`` after one step of the case."""
    engine = dpkernels.PrivacyEngine()
    rivals.with_ours(engine, case.build(device), rivals.Privacy(1.0, 1.0))()
    return [
        {
            "status": "ok",
            **row,
            "why_not": "; ".join(f"{n}: {w}" for n, w in row["why_not"].items()),
        }
        for row in engine.explain().rows
    ]
