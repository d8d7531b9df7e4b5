"""What the planner's choice costs against the best measured one, shape by shape.

Candidates are the strategies on offer times the backends worth timing; for convolutions also each
form that the CPU backend chooses from. Each call is the work of one parameter in a step: norms,
clip, clipped sum. The best candidate is found on every other round and judged on the rest, so that
picking the luckiest of several noisy times does not count as regret. Judged are the plan that
counts operations, and (columns ``measured_``) the one that times a first step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from bench import results, table, work
from dpkernels import ops
from dpkernels.engine.plan.planner import PLANS, Planner
from dpkernels.engine.plan.strategies import held_by
from dpkernels.layers import margins
from dpkernels.layers.costs import Cost, nbytes, stored_bytes
from dpkernels.layers.operands import ConvOperand, EmbeddingOperand, LinearOperand, Operand
from dpkernels.ops import native
from dpkernels.ops.conv import library, tiles
from dpkernels.ops.conv.cpu import GradSample
from dpkernels.ops.conv.geometry import Geometry
from dpkernels.ops.registry import BackendUnavailable
from dpkernels.ops.sums import squared_norms

PATH = results.RESULTS / "regret.csv"
KEY = ("device", "threads", "shape")
_SECONDS = 0.6
#: other layers of the same shape between the two halves of a call, and the most bytes they touch
_LAYERS = 10
_MOST_TOUCHED = 1 << 26
_ROUNDS = 6
_UNBOUNDED = 1 << 60
_BOUND = 1.0
_AUTO = "auto"
#: of the columns of each kind of plan
_PREFIXES = {"auto": "", "measured": "measured_"}
#: a candidate whose first call takes this many times the fastest one's is not a candidate
FAR_SLOWER = 4.0
Half = TypeVar("Half")
#: the first half of a call, which returns the second
Work = Callable[[], Callable[[], torch.Tensor]]
#: what the convolution's CPU backend chooses from
_CONV_FORMS: Mapping[str, GradSample] = {
    "tiles": tiles.grad_sample,
    "grouped": library.grouped_grad_sample,
    "looped": library.looped_grad_sample,
}

#: B, T, I, O
LINEAR = tuple(
    (batch, length, inputs, outputs)
    for batch, length in ((256, 1), (8, 16), (32, 16), (8, 64), (32, 64), (8, 256), (4, 1024))
    for inputs, outputs in ((64, 64), (256, 256), (256, 1024), (1024, 256))
)
#: B, Cin, Cout, side, kernel, stride, axes
CONVOLUTIONS = (
    (2, 1, 24, 48, 3, 1, 3),
    (2, 24, 24, 48, 3, 1, 3),
    (2, 48, 48, 24, 3, 1, 3),
    (2, 96, 96, 12, 3, 1, 3),
    (4, 32, 64, 12, 3, 2, 3),
    (4, 128, 128, 4, 3, 1, 3),
    (8, 16, 16, 16, 3, 1, 3),
    (64, 3, 64, 32, 3, 1, 2),
    (64, 16, 16, 32, 3, 1, 2),
    (64, 64, 64, 32, 3, 1, 2),
    (64, 128, 128, 16, 3, 1, 2),
    (64, 256, 256, 8, 3, 1, 2),
    (64, 512, 512, 4, 3, 1, 2),
    (32, 64, 256, 16, 1, 1, 2),
    (32, 256, 64, 16, 1, 1, 2),
    (32, 3, 192, 32, 4, 4, 2),
)
#: B, T, rows of the table, D
EMBEDDINGS = (
    (512, 16, 16_000, 32),
    (32, 64, 2_000, 64),
    (8, 128, 2_000, 256),
    (256, 1, 1_000, 16),
)


def run(budget: float | None, fresh: bool, path: Path = PATH) -> work.Outcome:
    """Measure the grid on one thread; rows are written shape by shape."""
    torch.set_num_threads(1)
    todo = {name: partial(_write, name, make, path) for name, make in grid().items()}
    settings = {"shapes": list(todo), "output": str(path)}
    return work.off(todo, "regret", settings, fresh=fresh, budget=budget)


def grid() -> dict[str, Callable[[], Operand]]:
    """Shapes by name, each with what makes its operand."""
    found: dict[str, Callable[[], Operand]] = {}
    for shape in LINEAR:
        found["linear B={} T={} {}->{}".format(*shape)] = partial(_linear, *shape)
    for shape in CONVOLUTIONS:
        batch, inputs, outputs, side, kernel, stride, axes = shape
        name = f"conv B={batch} {inputs}->{outputs} {side}^{axes} k={kernel} s={stride}"
        found[name] = partial(_conv, *shape)
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


def _write(name: str, make: Callable[[], Operand], path: Path, report: work.Report) -> None:
    torch.manual_seed(0)
    operand = make()
    row = {"shape": name, **measure(operand, _parameter(operand))}
    here = asdict(results.Environment.here(torch.device("cpu"), "system"))
    table.replace(path, [{**row, **here}], KEY)


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
        for name, form in _CONV_FORMS.items():
            calls[f"store, {name}"] = partial(_formed, form, operand)
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


def _formed(form: GradSample, operand: ConvOperand) -> Callable[[], torch.Tensor]:
    return _stored(form(operand.input, operand.backprops, operand.geometry))


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


def _linear(batch: int, length: int, inputs: int, outputs: int) -> LinearOperand:
    return LinearOperand(torch.randn(batch, length, inputs), torch.randn(batch, length, outputs))


def _conv(
    batch: int, inputs: int, outputs: int, side: int, kernel: int, stride: int, axes: int
) -> ConvOperand:
    padding = kernel // 2 if kernel % 2 else 0
    reached = (side + 2 * padding - kernel) // stride + 1
    return ConvOperand(
        torch.randn(batch, inputs, *[side] * axes),
        torch.randn(batch, outputs, *[reached] * axes),
        Geometry(
            (outputs, inputs, *(kernel,) * axes),
            (stride,) * axes,
            (padding,) * axes,
            (1,) * axes,
            1,
        ),
        batch,
    )


def _embedding(batch: int, length: int, rows: int, width: int) -> EmbeddingOperand:
    ids = torch.randint(rows, (batch, length))
    return EmbeddingOperand(ids, torch.randn(batch, length, width), rows, -1)
