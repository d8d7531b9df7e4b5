"""The correctness gate: only a rival that releases the per-sample loop's gradient is timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch

from bench.cases import SampleCrossEntropy, Workload
from bench.rivals import Trainer

#: a parameter whose gradient is smaller than this share of the whole is judged against the share;
#: in bfloat16 (where float32 has passed before) every one against the whole
_SHARE = {"float32": 1e-2, "bfloat16": 1.0}
#: error that is always allowed, by precision
_FLOOR = {"float32": 1e-4, "bfloat16": 2e-2}
#: also allowed: this multiple of the rounding error of plain autograd at that precision, one
#: sample at a time or the whole batch at once (a ReLU that flips is a visible error of both)
_ROUNDING = 3.0
_SAMPLES_FOR_BOUND = 3
#: what a rival may leave for rounding below the largest clip factor allowed (docs/math.md,
#: section 1); it comes on top of what is allowed
LARGEST_MARGIN = 1e-2
#: by parameter name, means over samples: of clipped gradients, and of gradients as they are
Sums = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Truth:
    """What every private rival has to release with the noise off.

    Attributes:
        gradients: by parameter name: sum of clipped gradients over B, in the truth's precision.
        max_grad_norm: the bound C, the median norm of the first samples, so that about half of
            the samples are clipped.
        allowed: error above which a rival fails.
    """

    gradients: dict[str, torch.Tensor]
    max_grad_norm: float
    allowed: float
    precision: str = "float32"

    def error(self, gradients: dict[str, torch.Tensor]) -> float:
        """Largest relative error of a parameter's gradient; infinite where one is missing."""
        whole = _norm(list(self.gradients.values()))
        worst = 0.0
        for name, expected in self.gradients.items():
            actual = gradients.get(name)
            if actual is None or not bool(actual.isfinite().all()):
                return float("inf")
            difference = torch.linalg.vector_norm(actual.to(expected.dtype) - expected)
            scale = max(float(torch.linalg.vector_norm(expected)), _SHARE[self.precision] * whole)
            worst = max(worst, float(difference) / scale)
        return worst


def ground_truth(workload: Workload) -> Truth:
    """Clipped gradients by one sample at a time through plain autograd in float64."""
    bound = _bound(workload)
    exact = _sums(workload.in_precision(torch.float64), bound)
    return _truth(workload, bound, exact, _sums(workload, bound))


def truths(workload: Workload) -> list[tuple[Workload, Truth]]:
    """What a rival has to pass, in order: bfloat16 has to be right in float32 first.

    In bfloat16 the loop in float32 is the truth of both, and runs once.
    """
    if workload.case.precision == "float32":
        return [(workload, ground_truth(workload))]
    exact = workload.in_precision(torch.float32)
    bound = _bound(exact)
    sums = _sums(exact, bound)
    return [
        (exact, _truth(exact, bound, sums, sums)),
        (workload, _truth(workload, bound, sums, _sums(workload, bound))),
    ]


def _bound(workload: Workload) -> float:
    norms = [_norm(g) for g in islice(_each_sample(workload), _SAMPLES_FOR_BOUND)]
    return float(torch.tensor(norms).median())


def _truth(workload: Workload, bound: float, exact: Sums, by_loop: Sums) -> Truth:
    """The `exact` sums, and what the workload's own rounding allows beside them."""
    precision = workload.case.precision
    clipped, plain = (Truth(sums, bound, 0.0, precision) for sums in exact)
    error = max(clipped.error(by_loop[0]), plain.error(_whole_batch(workload)))
    return replace(clipped, allowed=max(_FLOOR[precision], _ROUNDING * error))


def released(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradient that one step uses; the trainer is cleared."""
    trainer.step()
    found = {name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None}
    trainer.clear()
    return found


def _each_sample(workload: Workload) -> Iterator[list[torch.Tensor]]:
    model, criterion = workload.fresh_model(), SampleCrossEntropy()
    for sample in workload.samples():
        model.zero_grad()
        sample.loss(model, criterion).backward()
        yield [p.grad for p in model.parameters()]


def _sums(workload: Workload, bound: float) -> Sums:
    """Mean over samples of the clipped gradients, and of the gradients as they are."""
    names = [name for name, _ in workload.model.named_parameters()]
    clipped = [torch.zeros_like(p) for p in workload.model.parameters()]
    plain = [torch.zeros_like(p) for p in workload.model.parameters()]
    for gradient in _each_sample(workload):
        torch._foreach_add_(clipped, gradient, alpha=min(1.0, bound / _norm(gradient)))
        torch._foreach_add_(plain, gradient)
    torch._foreach_div_(clipped, float(workload.batch_size))
    torch._foreach_div_(plain, float(workload.batch_size))
    return dict(zip(names, clipped, strict=True)), dict(zip(names, plain, strict=True))


def _whole_batch(workload: Workload) -> dict[str, torch.Tensor]:
    """The ordinary gradient of the batch's mean loss."""
    model = workload.fresh_model()
    workload.loss(model, SampleCrossEntropy()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _norm(gradient: list[torch.Tensor]) -> float:
    return float(torch.stack([g.double().square().sum() for g in gradient]).sum().sqrt())
