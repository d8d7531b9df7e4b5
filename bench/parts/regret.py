"""What the planner's choice costs against the best measured one, shape by shape.

Candidates are the strategies on offer times the backends worth timing; for convolutions also each
form that the CPU backend chooses from. Each call is the work of one parameter in a step: norms,
clip, clipped sum. The best candidate is found on every other round and judged on the rest, so that
picking the luckiest of several noisy times does not count as regret. Judged are the plan that
counts operations, and (columns ``measured_``) the one that times a first step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch

from bench import layers, table, work
from bench.layers import Conv, Linear
from bench.part import How, Part, Row, Todo
from dpkernels import ops
from dpkernels.engine.plan.planner import PLANS, Planner
from dpkernels.engine.plan.strategies import held_by
from dpkernels.layers import margins
from dpkernels.layers.costs import Cost, nbytes, stored_bytes
from dpkernels.layers.operands import ConvOperand, EmbeddingOperand, LinearOperand, Operand
from dpkernels.ops import native
from dpkernels.ops.registry import BackendUnavailable
from dpkernels.ops.sums import squared_norms

_SECONDS = 0.6
#: other layers of the same shape between the two halves of a call, and the most bytes they touch
_LAYERS = 10
_MOST_TOUCHED = 1 << 26
_ROUNDS = 6
_UNBOUNDED = 1 << 60
_BOUND = 1.0
_AUTO = "auto"
#: what the planner may cost at most
_WANTED = 0.10
#: of the columns of each kind of plan
_PREFIXES = {"auto": "", "measured": "measured_"}
#: a candidate whose first call takes this many times the fastest one's is not a candidate
FAR_SLOWER = 4.0
Half = TypeVar("Half")
#: the first half of a call, which returns the second
Work = Callable[[], Callable[[], torch.Tensor]]
LINEAR = tuple(
    Linear(batch, length, inputs, outputs)
    for batch, length in ((256, 1), (8, 16), (32, 16), (8, 64), (32, 64), (8, 256), (4, 1024))
    for inputs, outputs in ((64, 64), (256, 256), (256, 1024), (1024, 256))
)
CONVOLUTIONS = (
    Conv(2, 1, 24, 48),
    Conv(2, 24, 24, 48),
    Conv(2, 48, 48, 24),
    Conv(2, 96, 96, 12),
    Conv(4, 32, 64, 12, stride=2),
    Conv(4, 128, 128, 4),
    Conv(8, 16, 16, 16),
    Conv(64, 3, 64, 32, axes=2),
    Conv(64, 16, 16, 32, axes=2),
    Conv(64, 64, 64, 32, axes=2),
    Conv(64, 128, 128, 16, axes=2),
    Conv(64, 256, 256, 8, axes=2),
    Conv(64, 512, 512, 4, axes=2),
    Conv(32, 64, 256, 16, kernel=1, axes=2),
    Conv(32, 256, 64, 16, kernel=1, axes=2),
    Conv(32, 3, 192, 32, kernel=4, stride=4, axes=2),
)
#: B, T, rows of the table, D
EMBEDDINGS = (
    (512, 16, 16_000, 32),
    (32, 64, 2_000, 64),
    (8, 128, 2_000, 256),
    (256, 1, 1_000, 16),
)


def todo(how: How) -> Todo:
    """The grid, shape by shape."""
    return Todo({name: partial(_measure, name, make) for name, make in grid().items()}, how)


def grid() -> dict[str, Callable[[], Operand]]:
    """Shapes by name, each with what makes its operand."""
    found: dict[str, Callable[[], Operand]] = {}
    for layer in (*LINEAR, *CONVOLUTIONS):
        found[f"{type(layer).__name__.lower()} {layer}"] = partial(_of_layer, layer)
    for shape in EMBEDDINGS:
        found["embedding B={} T={} {}x{}".format(*shape)] = partial(_embedding, *shape)
    return found


def measure(
    operand: Operand, parameter: torch.Tensor, seconds: float = _SECONDS
) -> dict[str, object]:
    """What each kind of plan chooses for one operand, and the best candidate."""
    calls = _candidates(operand, parameter)
    search, judge = _interleaved(calls, seconds, _other_layers(operand, parameter))
    best = min(search, key=search.__getitem__)
    row: dict[str, object] = {"best": best, "best_ms": 1e3 * judge[best]}
    for plan in PLANS:
        planner = Planner(memory_budget=_UNBOUNDED, plan=plan)
        choice = planner.choose(operand, "weight", "layer", parameter)
        chosen = f"{choice.strategy}, {choice.forced or _AUTO}"
        chosen = chosen if chosen in judge else f"{choice.strategy}, {_AUTO}"
        prefix = _PREFIXES[plan]
        row[f"{prefix}chosen"] = chosen
        row[f"{prefix}regret"] = judge[chosen] / judge[best] - 1.0
    row["candidates"] = "; ".join(f"{name} {1e3 * t:.3g} ms" for name, t in judge.items())
    return row


def _measure(name: str, make: Callable[[], Operand], report: work.Report) -> Iterator[list[Row]]:
    torch.manual_seed(0)
    operand = make()
    yield [{"shape": name, **measure(operand, _parameter(operand))}]


def _candidates(operand: Operand, parameter: torch.Tensor) -> dict[str, Work]:
    """What can run and is not far slower than the others at the first call."""
    calls: dict[str, Work] = {}
    for strategy in (name for name, offer in operand.offers().items() if isinstance(offer, Cost)):
        calls[f"{strategy}, {_AUTO}"] = partial(_work, operand, parameter, strategy, None)
        op, arguments = operand.kernel(strategy) or (None, ())
        for backend in op.candidates(*arguments)[1:] if op else ():
            name = f"{strategy}, {backend}"
            calls[name] = partial(_work, operand, parameter, strategy, backend)
    if isinstance(operand, ConvOperand) and native.why_not_cpu() is None:
        forms = layers.forms(operand.input, operand.backprops, operand.geometry)
        for name, form in forms.items():
            calls[f"store, {name}"] = lambda form=form: _stored(form())
    first: dict[str, float] = {}
    for name, call in calls.items():
        start = time.thread_time()
        with suppress(BackendUnavailable):
            call()()
            first[name] = time.thread_time() - start
    limit = FAR_SLOWER * min(first.values())
    return {n: calls[n] for n, t in first.items() if t <= limit or n.endswith(_AUTO)}


def _work(
    operand: Operand, parameter: torch.Tensor, strategy: str, backend: str | None
) -> Callable[[], torch.Tensor]:
    held = held_by(strategy, operand, parameter, backend)
    if isinstance(held, torch.Tensor):
        return _stored(held)
    norm_sq = held.norm_sq()

    def clipped() -> torch.Tensor:
        bound_sq = held.norm_bound(norm_sq).square().float()
        return held.clipped_grad(ops.clip_factor(bound_sq, _BOUND))

    return clipped


def _stored(held: torch.Tensor) -> Callable[[], torch.Tensor]:
    norm_sq = squared_norms(held)

    def clipped() -> torch.Tensor:
        bound_sq = margins.of_values(norm_sq).square().float()
        out = held.new_zeros(held.shape[1:])
        return ops.weighted_sum_(out, held, ops.clip_factor(bound_sq, _BOUND))

    return clipped


def _parameter(operand: Operand) -> torch.Tensor:
    """A parameter of the shape that the operand is the gradient of."""
    return torch.zeros(operand.part(slice(0, 1)).grad_sample().shape[1:])


def _interleaved(
    calls: Mapping[str, Work], seconds: float, others: torch.Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Processor time of each call, seconds: lower quartile of the even and of the odd rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end, rounds = time.monotonic() + seconds * len(calls), 0
    while time.monotonic() < end or rounds < _ROUNDS or rounds % 2:
        for name, call in calls.items():
            first, finish = _timed(call, others)
            times[name].append(first + _timed(finish, others)[0])
        rounds += 1
    return tuple(
        {name: sorted(t[half::2])[len(t) // 8] for name, t in times.items()} for half in (0, 1)
    )  # type: ignore[return-value]


def _other_layers(operand: Operand, parameter: torch.Tensor) -> torch.Tensor:
    """As many bytes as the other layers' tensors and stored gradients."""
    tensors = (v for v in vars(operand).values() if isinstance(v, torch.Tensor))
    layer = nbytes(*tensors) + stored_bytes(operand.samples, parameter.numel(), parameter)
    return torch.zeros(min(_LAYERS * layer, _MOST_TOUCHED) // 4)


def _timed(run: Callable[[], Half], others: torch.Tensor) -> tuple[float, Half]:
    """Processor time of a call that finds the caches full of `others`, and what it returns."""
    others.add_(1.0)
    start = time.thread_time()
    found = run()
    return time.thread_time() - start, found


def _of_layer(layer: Linear | Conv) -> Operand:
    pair = layer.operands()
    if isinstance(layer, Linear):
        return LinearOperand(*pair)
    return ConvOperand(*pair, layer.geometry, layer.batch)


def _embedding(batch: int, length: int, rows: int, width: int) -> EmbeddingOperand:
    ids = torch.randint(rows, (batch, length))
    return EmbeddingOperand(ids, torch.randn(batch, length, width), rows, -1)


def digest(rows: list[dict[str, str]]) -> list[str]:
    """What the planner's choices cost against the best measured candidates."""
    lines = []
    for title, prefix in (("the planner's choice", ""), ('plan="measured"', "measured_")):
        regrets = {r["shape"]: float(r[f"{prefix}regret"]) for r in rows}
        mean = statistics.geometric_mean(1.0 + value for value in regrets.values()) - 1.0
        above = sorted(
            (row for row in rows if regrets[row["shape"]] > _WANTED),
            key=lambda row: -regrets[row["shape"]],
        )
        listed = "; ".join(
            f"{r['shape']} {regrets[r['shape']]:.0%} ({r[f'{prefix}chosen']}; best {r['best']})"
            for r in above
        )
        where = table.provenance(rows)
        lines.append(
            f"Regret, {title} over the best measured candidate: {mean:.1%} in the "
            f"geometric mean of {len(rows)} shapes, at most {max(regrets.values()):.0%}, above "
            f"{_WANTED:.0%} at {len(above)}{': ' if above else ''}{listed}. ({where})"
        )
    return lines


def strategies(rows: list[dict[str, str]]) -> list[str]:
    """Where each strategy takes over: the best measured one and the chosen one, by shape."""
    head = (
        "Where each strategy takes over, one parameter's norms, clip and sum on one thread: the "
        "strategy that is fastest as measured, in brackets the time of the next one over its own "
        f"(a strategy {FAR_SLOWER:.0f} times as slow is not timed). In bold: shapes where "
        f"the planner takes another one. ({table.provenance(rows)})"
    )
    grids: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        family, *rest = row["shape"].split()
        line, column = " ".join(rest), "fastest"
        if family == "linear":
            line, column = " ".join(rest[:-1]), rest[-1]
        grids.setdefault(family, {}).setdefault(line, {})[column] = _taken(row)
    return [head, *(_grid(family, grid) for family, grid in grids.items())]


def _grid(family: str, grid: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(column for line in grid.values() for column in line))
    lines = [(name, *(line.get(column, "–") for column in columns)) for name, line in grid.items()]
    return table.markdown((family, *columns), lines)


def _taken(row: dict[str, str]) -> str:
    """Of a row of regret: the fastest strategy, the next one, and what the planner took instead."""
    times: dict[str, float] = {}
    for candidate in row["candidates"].split("; "):
        name, _, taken = candidate.rpartition(", ")[0], "", candidate.split()[-2]
        times[name] = min(times.get(name, float("inf")), float(taken))
    order = sorted(times, key=times.__getitem__)
    others = ", ".join(f"{name} {times[name] / times[order[0]]:.2f}" for name in order[1:])
    text = f"{order[0]} ({others})" if others else order[0]
    chosen = row["chosen"].partition(",")[0]
    return text if chosen == order[0] else f"**{text}, taken: {chosen}**"


PART = Part(
    "regret",
    "The planner's choice against the best measured candidate, shape by shape.",
    ("device", "threads", "shape"),
    todo,
    seconds=140.0,
    digest=digest,
    tables=strategies,
    headline=True,
)
