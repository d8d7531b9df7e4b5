"""The planner: which strategy computes a parameter's norm, and why.

Costs are counted (floating-point operations and bytes per strategy, docs/math.md, section 2) and
weighed by the device's ridge point, where bytes that stay in the cache cost nothing; or strategies
are timed on the first step's own operands. While the first backward pass runs, each layer is
decided on its own; at the end of the pass the plan is made again over all layers: the memory budget
for stored gradients is spent where a byte saves the most work.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from dataclasses import dataclass, field

import torch

from dpkernels import ops
from dpkernels.engine.plan.ridge_point import kind_of_products, ridge_point, wait
from dpkernels.engine.plan.strategies import held_by
from dpkernels.layers import margins
from dpkernels.layers.costs import STRATEGIES, Cost
from dpkernels.layers.operands import Around, ConvOperand, Operand
from dpkernels.ops.sums import squared_norms

PLANS = ("auto", "measured")
#: share of free memory that stored per-sample gradients may take by default
_BUDGET_SHARE = 0.25
#: bytes moved by one layer that stay in a processor's cache: measured on small Linear layers
_CACHED = {"cpu": 1 << 22}
#: timed runs of each candidate of ``plan="measured"``
_RUNS = 3
_REUSED = "used several times in one pass, so the norm is that of a sum: only store adds up"


@dataclass(frozen=True)
class Choice:
    """The planner's decision for one parameter and one shape of a sample.

    Attributes:
        strategy: one of :data:`dpkernels.layers.costs.STRATEGIES`.
        forced: the backend that the strategy's kernels are to run on; None leaves the backend open.
        reason: why the strategy was chosen.
    """

    strategy: str
    forced: str | None
    reason: str


@dataclass
class Entry:
    """What the planner knows of one parameter and one shape of a sample."""

    layer: str
    parameter: str
    shape: str
    samples: int
    #: by strategy on offer: its cost for `samples` samples
    costs: dict[str, Cost]
    #: by strategy that is not on offer: why
    absent: dict[str, str]
    #: by strategy on offer: the backend that the registry takes
    backends: dict[str, str]
    #: by strategy on offer: the operations that the device could do in the strategy's time; with
    #: plan="measured" the time in seconds: infinite if not timed, 0 if there is no kernel to time
    work: dict[str, float]
    #: by strategy: the fastest backend, where candidates were measured
    fastest: dict[str, str] = field(default_factory=dict)
    #: by strategy on offer, but ruled out for another reason than its work: the reason
    refused: dict[str, str] = field(default_factory=dict)
    choice: Choice = Choice("", None, "")

    def pick(self, strategy: str, reason: str) -> None:
        """Settle on a strategy."""
        self.choice = Choice(strategy, self.fastest.get(strategy), reason)

    @property
    def cost(self) -> Cost:
        """Cost of the chosen strategy."""
        return self.costs[self.choice.strategy]

    @property
    def backend(self) -> str:
        """The backend whose kernel the chosen strategy runs first."""
        return self.choice.forced or self.backends[self.choice.strategy]

    def kept(self, strategy: str, samples: int) -> float:
        """Bytes of stored gradients for `samples` samples; other strategies store none."""
        if strategy != "store":
            return 0.0
        return self.costs[strategy].kept * samples / self.samples

    def why_not(self) -> dict[str, str]:
        """By strategy that was not chosen: the reason, in one sentence."""
        chosen = self.work[self.choice.strategy]
        reasons = {
            name: f"{work / max(chosen, 1e-30):.3g} times the work"
            if math.isfinite(work)
            else "it does not fit memory_budget, so it was not timed"
            for name, work in self.work.items()
        }
        reasons = {**self.absent, **reasons, **self.refused}
        return {n: reasons[n] for n in STRATEGIES if n != self.choice.strategy}


def default_memory_budget(device: torch.device) -> int:
    """Bytes for stored per-sample gradients: a quarter of the memory that is free now.

    On a GPU, memory that PyTorch's allocator has reserved but not given out counts as free.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((torch.cuda.mem_get_info(device)[0] + held) * _BUDGET_SHARE)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(free * _BUDGET_SHARE)


class Planner:
    """Chooses per parameter and shape of one sample, and remembers the choice.

    Args:
        memory_budget: bytes for stored per-sample gradients; None takes a quarter of the memory
            that is free at the first step.
        plan: ``"auto"`` counts operations and bytes; ``"measured"`` times every strategy and
            backend on the first step's operands.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, memory_budget: int | None = None, plan: str = "auto"):
        if memory_budget is not None and memory_budget < 0:
            raise ValueError(f"memory_budget={memory_budget}: expected a number of bytes >= 0")
        if plan not in PLANS:
            raise ValueError(f"plan={plan!r}: expected one of {', '.join(map(repr, PLANS))}")
        self.memory_budget = memory_budget
        self.plan = plan
        self.entries: dict[tuple[str, str, bool], Entry] = {}
        self._reused: set[str] = set()
        self._samples = 0
        self._changed = False

    def choose(self, operand: Operand, parameter: str, layer: str, like: torch.Tensor) -> Choice:
        """The strategy for this operand of `parameter`, whose tensor is `like`."""
        samples = operand.samples
        if samples > self._samples:
            self._samples = samples
            self._spend()
        key = (parameter, _signature(operand), samples == 1)
        if key not in self.entries:
            entry = self.entries[key] = self._enter(operand, *key[:2], layer, like)
            self._decide_alone(entry)
            self._changed = True
        return self.entries[key].choice

    def reused(self, parameter: str) -> None:
        """Store the gradients of a parameter that received a second contribution in one pass."""
        if parameter not in self._reused:
            self._reused.add(parameter)
            self._changed = True

    def settle(self) -> None:
        """The end of a backward pass: plan over all layers, if something new was seen."""
        if self._changed:
            self._spend()
            self._changed = False

    def _enter(
        self, operand: Operand, parameter: str, shape: str, layer: str, like: torch.Tensor
    ) -> Entry:
        if self.memory_budget is None:
            self.memory_budget = default_memory_budget(like.device)
        offers = operand.offers()
        costs = {n: o for n, o in offers.items() if isinstance(o, Cost)}
        ridge = ridge_point(like.device, _products_of(operand, like.device))
        cached = _CACHED.get(like.device.type, 0)
        entry = Entry(
            layer,
            parameter,
            shape,
            operand.samples,
            costs,
            {n: o for n, o in offers.items() if isinstance(o, str)},
            {n: _backend(operand, n) for n in costs},
            {n: c.flops + ridge * max(c.traffic - cached, 0.0) for n, c in costs.items()},
        )
        if self.plan == "measured":
            self._measure(entry, operand, like)
        return entry

    def _measure(self, entry: Entry, operand: Operand, like: torch.Tensor) -> None:
        """Replace counted work by measured seconds: candidates take turns, medians count."""
        if operand.kernel(next(iter(entry.costs))) is None:
            entry.work = dict.fromkeys(entry.costs, 0.0)
            return
        left = self._left()
        candidates = [
            (strategy, backend)
            for strategy in entry.costs
            for backend in _candidates(operand, strategy)
            if entry.kept(strategy, entry.samples) <= max(left, 0.0)
        ]
        times: dict[tuple[str, str], list[float]] = {c: [] for c in candidates}
        factor = torch.full((operand.samples,), 0.5, device=like.device)
        for _ in range(_RUNS + 1):
            for candidate in candidates:
                times[candidate].append(_time(candidate, operand, like, factor))
        seconds = {c: statistics.median(values[1:]) for c, values in times.items()}
        for strategy in {s for s, _ in seconds}:
            own = {backend: t for (s, backend), t in seconds.items() if s == strategy}
            entry.fastest[strategy] = min(own, key=own.__getitem__)
        timed = {s: seconds[s, b] for s, b in entry.fastest.items()}
        entry.work = {s: timed.get(s, math.inf) for s in entry.costs}

    def _decide_alone(self, entry: Entry) -> None:
        """Pick the strategy of least work that fits the memory budget left by earlier layers."""
        left = self._left()
        fitting = {
            n: work
            for n, work in entry.work.items()
            if entry.kept(n, entry.samples) <= max(left, 0.0)
        }
        best = min(fitting or entry.work, key=entry.work.__getitem__)
        entry.pick(best, self._reason(entry, best))

    def _left(self) -> float:
        """Bytes of the budget that the layers so far leave; a parameter's largest shape counts."""
        used: dict[str, float] = {}
        for entry in self.entries.values():
            if entry.choice.strategy:
                kept = entry.kept(entry.choice.strategy, self._samples)
                used[entry.parameter] = max(kept, used.get(entry.parameter, 0.0))
        return (self.memory_budget or 0) - sum(used.values())

    def _spend(self) -> None:
        """Store where a byte saves the most work, until the budget is spent."""
        left = float(self.memory_budget or 0)
        waiting: list[tuple[float, Entry]] = []
        for entry in self.entries.values():
            entry.refused.clear()
            reused = entry.parameter in self._reused
            others = {n: work for n, work in entry.work.items() if n != "store"}
            if reused or not others:
                strategy = "store" if "store" in entry.costs else "single"
                if reused:
                    entry.refused = dict.fromkeys(set(entry.costs) - {strategy}, _REUSED)
                entry.pick(strategy, _REUSED if reused else self._reason(entry, strategy))
                left -= entry.kept(strategy, self._samples)
                continue
            best = min(others, key=others.__getitem__)
            entry.pick(best, self._reason(entry, best))
            saved = entry.work[best] - entry.work.get("store", math.inf)
            if saved > 0:
                kept = entry.kept("store", self._samples)
                own = max(kept * entry.samples / self._samples, 1.0)
                waiting.append((saved / own, entry))
        for _, entry in sorted(waiting, key=lambda row: -row[0]):
            kept = entry.kept("store", self._samples)
            if kept <= left:
                left -= kept
                entry.pick("store", self._reason(entry, "store"))
            else:
                entry.refused["store"] = (
                    f"{kept:.3g} bytes of stored gradients exceed what memory_budget leaves"
                )

    def _reason(self, entry: Entry, strategy: str) -> str:
        others = [work for name, work in entry.work.items() if name != strategy]
        if not others:
            return "the only strategy for this layer"
        ratio = min(others) / max(entry.work[strategy], 1e-30)
        if ratio < 1:
            return "the least work that fits memory_budget"
        how = "measured" if entry.fastest else "counted"
        return f"{ratio:.3g} times less work than the next, {how}"


def _backend(operand: Operand, strategy: str) -> str:
    kernel = operand.kernel(strategy)
    if kernel is None:
        return "autograd"
    op, arguments = kernel
    return op.backend(*arguments)


def _candidates(operand: Operand, strategy: str) -> tuple[str, ...]:
    """The backends to be timed; none where there is nothing to choose."""
    kernel = operand.kernel(strategy)
    if kernel is None:
        return ()
    op, arguments = kernel
    return op.candidates(*arguments)


def _time(
    candidate: tuple[str, str], operand: Operand, like: torch.Tensor, factor: torch.Tensor
) -> float:
    """Seconds of norm and clipped sum by a strategy on a backend; infinite if unavailable."""
    wait(like.device)
    began = time.perf_counter()
    try:
        held = held_by(candidate[0], operand, like, candidate[1])
        if isinstance(held, torch.Tensor):
            margins.of_values(squared_norms(held))
            ops.weighted_sum_(torch.zeros_like(held[0]), held, factor)
        else:
            held.norm_bound(held.norm_sq())
            held.clipped_grad(factor)
    except ops.BackendUnavailable:
        return math.inf
    wait(like.device)
    return time.perf_counter() - began


def _tensors_of(operand: Operand) -> list[torch.Tensor]:
    own = vars(_innermost(operand)).values()
    return [value for value in own if isinstance(value, torch.Tensor)]


def _innermost(operand: Operand) -> Operand:
    """The operand inside the operand of a piece of a parameter, or of a computed parameter."""
    while isinstance(operand, Around):
        operand = operand.operand
    return operand


def _products_of(operand: Operand, device: torch.device) -> str:
    """The kind of products (:func:`kind_of_products`) that multiply the operand's tensors."""
    floating = [t.dtype for t in _tensors_of(operand) if t.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, floating)
    return kind_of_products(device, dtype, isinstance(_innermost(operand), ConvOperand))


def _signature(operand: Operand) -> str:
    """Shapes of one sample's tensors: the choice does not depend on the drawn batch size."""
    shapes = [tuple(t.shape[1:]) for t in _tensors_of(operand)]
    return " ".join("x".join(map(str, shape)) or "1" for shape in shapes)
