"""The plan as a table: the result of ``PrivacyEngine.explain()``."""

from __future__ import annotations

from typing import Any

from dpkernels.engine.plan.planner import Planner


class Plan:
    """The plan as chosen so far, as a list of dicts in ``rows``, and as a table when printed.

    A row has ``layer``, ``parameter``, ``shape`` (of one sample's tensors), ``strategy``,
    ``backend``, ``share`` (predicted, of the work of all rows), ``flops`` and ``bytes`` (of the
    strategy, for the samples of the batch that was planned), ``kept_bytes`` (from the layer's
    backward until the end of the backward pass), ``why``, and ``why_not``: by strategy that was
    not chosen, the reason in one sentence. There is no row before the first backward pass.
    """

    _COLUMNS = ("layer", "parameter", "shape", "strategy", "backend", "share", "kept_bytes", "why")

    def __init__(self, planner: Planner):
        entries = list(planner.entries.values())
        chosen = [entry.work[entry.choice.strategy] for entry in entries]
        total = sum(chosen) or 1.0
        self.rows: list[dict[str, Any]] = [
            {
                "layer": e.layer,
                "parameter": e.parameter,
                "shape": e.shape,
                "strategy": e.choice.strategy,
                "backend": e.backend,
                "share": work / total,
                "flops": e.cost.flops,
                "bytes": e.cost.traffic,
                "kept_bytes": e.cost.kept,
                "why": e.choice.reason,
                "why_not": e.why_not(),
            }
            for e, work in zip(entries, chosen, strict=True)
        ]

    def __str__(self) -> str:
        if not self.rows:
            return "no plan yet: it is made in the first backward pass"
        cells: list[tuple[str, ...]] = [(*self._COLUMNS, "why not the others")]
        for row in self.rows:
            others = "; ".join(f"{name}: {reason}" for name, reason in row["why_not"].items())
            shown = (f"{row[c]:.1%}" if c == "share" else f"{row[c]}" for c in self._COLUMNS)
            cells.append((*shown, others))
        widths = [max(len(r[i]) for r in cells) for i in range(len(cells[0]))]
        lines = ["  ".join(v.ljust(w) for v, w in zip(r, widths)).rstrip() for r in cells]
        return "\n".join(lines)

    __repr__ = __str__
