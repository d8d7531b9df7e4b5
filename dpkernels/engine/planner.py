"""The planner: which strategy computes a parameter's norm, and why.

Costs are counted, not measured: floating-point operations and bytes per strategy (docs/math.md,
section 2), weighed by the device's ridge point, under a memory budget for stored gradients.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from dpkernels.layers.operands import Cost, Operand, PieceOperand

#: floating-point operations that a device does in the time of moving one byte (its ridge point)
_RIDGE = {"cpu": 10.0, "cuda": 160.0}
#: share of free memory that stored per-sample gradients may take by default
_BUDGET_SHARE = 0.25


@dataclass(frozen=True)
class Choice:
    """One row of the plan."""

    layer: str
    parameter: str
    shape: str
    strategy: str
    backend: str
    cost: Cost
    reason: str


def default_memory_budget(device: torch.device) -> int:
    """Bytes for stored per-sample gradients: a quarter of the memory that is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _BUDGET_SHARE)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(free * _BUDGET_SHARE)


class Planner:
    """Chooses once per parameter and shape of one sample, and remembers the choice.

    Args:
        memory_budget: bytes for stored per-sample gradients; None takes a share of free memory.
    """

    def __init__(self, memory_budget: int | None = None):
        if memory_budget is not None and memory_budget < 0:
            raise ValueError(f"memory_budget={memory_budget}: expected a number of bytes >= 0")
        self.memory_budget = memory_budget
        self.choices: dict[tuple[str, str], Choice] = {}

    def choose(self, operand: Operand, parameter: str, layer: str, like: torch.Tensor) -> str:
        """The strategy for this operand: ``store`` or ``gram``."""
        key = (parameter, _signature(operand))
        if key not in self.choices:
            self.choices[key] = self._decide(operand, *key, layer, like)
        return self.choices[key].strategy

    def _decide(
        self, operand: Operand, parameter: str, shape: str, layer: str, like: torch.Tensor
    ) -> Choice:
        costs = operand.costs()
        ridge = _RIDGE.get(like.device.type, _RIDGE["cpu"])
        if self.memory_budget is None:
            self.memory_budget = default_memory_budget(like.device)
        stored = sum(c.cost.kept for c in self.choices.values() if c.strategy == "store")
        work = {name: cost.flops + ridge * cost.traffic for name, cost in costs.items()}
        best = min(work, key=work.__getitem__)
        reason = "the only strategy for this layer"
        if len(costs) > 1:
            other = max(work, key=work.__getitem__)
            reason = f"{work[other] / max(work[best], 1.0):.3g} times less work than {other}"
            if best == "store" and stored + costs["store"].kept > self.memory_budget:
                best, reason = "gram", "stored gradients would exceed memory_budget"
        return Choice(layer, parameter, shape, best, operand.backend(best), costs[best], reason)


class Plan:
    """What :meth:`PrivacyEngine.explain` returns: rows as dicts, and a table when printed."""

    _COLUMNS = ("layer", "parameter", "shape", "strategy", "backend", "share", "kept_bytes", "why")

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    @classmethod
    def of(cls, planner: Planner) -> Plan:
        """The plan as chosen so far; empty before the first backward pass."""
        choices = list(planner.choices.values())
        total = sum(c.cost.flops for c in choices) or 1.0
        return cls(
            [
                {
                    "layer": c.layer,
                    "parameter": c.parameter,
                    "shape": c.shape,
                    "strategy": c.strategy,
                    "backend": c.backend,
                    "share": c.cost.flops / total,
                    "kept_bytes": c.cost.kept,
                    "why": c.reason,
                }
                for c in choices
            ]
        )

    def __str__(self) -> str:
        if not self.rows:
            return "no plan yet: it is made in the first backward pass"
        cells = [self._COLUMNS] + [
            tuple(f"{row[c]:.1%}" if c == "share" else f"{row[c]}" for c in self._COLUMNS)
            for row in self.rows
        ]
        widths = [max(len(r[i]) for r in cells) for i in range(len(self._COLUMNS))]
        lines = ["  ".join(v.ljust(w) for v, w in zip(r, widths)).rstrip() for r in cells]
        return "\n".join(lines)

    __repr__ = __str__


def _signature(operand: Operand) -> str:
    """Shapes of one sample's tensors: the choice does not depend on the drawn batch size."""
    operand = operand.piece if isinstance(operand, PieceOperand) else operand
    shapes = [tuple(v.shape[1:]) for v in vars(operand).values() if isinstance(v, torch.Tensor)]
    return " ".join("x".join(map(str, shape)) or "1" for shape in shapes)
