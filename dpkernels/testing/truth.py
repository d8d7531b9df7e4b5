"""The truth, one sample at a time through plain autograd, and the comparison with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dpkernels.engine.privacy_engine import PrivacyEngine

Batch = tuple[torch.Tensor, ...]
#: of a model and a batch: a scalar, the mean over the batch's rows
Loss = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass(frozen=True)
class Released:
    """What one step releases without noise.

    Attributes:
        gradients: by parameter name, the clipped gradients' sum over the expected batch size.
        norms: [B]: norm of each sample's gradient over all parameters, before clipping.
        max_grad_norm: the bound C.
    """

    gradients: dict[str, torch.Tensor]
    norms: torch.Tensor
    max_grad_norm: float


def rows_of(batch: Batch, batch_first: bool, start: int, count: int) -> Batch:
    """The rows from `start` on of every tensor."""
    axis = int(not batch_first)
    return tuple(t.narrow(axis if t.ndim > axis else 0, start, count) for t in batch)


def microbatching(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    max_grad_norm: float | None,
    *,
    views_per_sample: int = 1,
    batch_first: bool = True,
    expected_batch_size: float | None = None,
) -> Released:
    """The truth: one sample at a time through plain autograd, on a copy and in its own dtype.

    Arguments as in :func:`dpkernels.testing.assert_per_sample`. The sum of clipped gradients is
    divided by `expected_batch_size`, or by the number of samples if that is None.
    """
    model = copy.deepcopy(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    each: list[list[torch.Tensor]] = []
    samples = batch[0].shape[int(not batch_first)] // views_per_sample
    for b in range(samples):
        model.zero_grad(set_to_none=True)
        rows = rows_of(batch, batch_first, b * views_per_sample, views_per_sample)
        loss(model, tuple(t.clone() for t in rows)).backward()
        each.append([torch.zeros_like(p) if p.grad is None else p.grad for p in trained.values()])
    norms = [torch.stack([g.square().sum() for g in own]).sum().sqrt() for own in each]
    bound = max_grad_norm or float(0.9 * sum(norms)) / max(samples, 1) or 1.0
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    for own, norm in zip(each, norms, strict=True):
        for name, gradient in zip(trained, own, strict=True):
            total[name] += torch.clamp(bound / norm, max=1.0) * gradient
    divisor = expected_batch_size or max(samples, 1)
    mean = {name: t / divisor for name, t in total.items()}
    return Released(mean, torch.stack(norms) if norms else torch.zeros(0), bound)


def fused(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    max_grad_norm: float,
    *,
    views_per_sample: int = 1,
    batch_first: bool = True,
    memory_budget: int | None = None,
) -> Released:
    """What the engine releases, noise off; arguments as in :func:`microbatching`."""
    model = copy.deepcopy(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    samples = max(batch[0].shape[int(not batch_first)] // views_per_sample, 1)
    private, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(trained.values(), lr=0.1),
        data_loader=DataLoader(range(samples), batch_size=samples),  # type: ignore[arg-type]
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        poisson_sampling=False,
        batch_first=batch_first,
        views_per_sample=views_per_sample,
        memory_budget=memory_budget,
    )
    loss(private, batch).backward()
    gradients: dict[str, Any] = {name: p.grad for name, p in trained.items()}
    step = optimizer.last_step
    norms = torch.zeros(0) if step is None else step.per_sample_norm
    return Released(gradients, norms, max_grad_norm)


def assert_released(
    actual: Released, expected: Released, tolerance: float = 1e-9, negligible: float = 1e-6
) -> None:
    """Assert that gradients and norms agree.

    Args:
        actual: what the engine released.
        expected: the truth.
        tolerance: largest error, relative to the norm of what is expected.
        negligible: a gradient that is smaller than this share of the whole gradient is rounding
            noise (a bias before an instance norm): its error is relative to the whole.

    Raises:
        AssertionError: naming the parameter with the largest error.
    """
    whole = math.hypot(*(float(g.double().norm()) for g in expected.gradients.values()))

    def error(actual: torch.Tensor | None, expected: torch.Tensor) -> float:
        if actual is None or actual.shape != expected.shape:
            return math.inf
        own = float(expected.double().norm())
        scale = own if own > negligible * whole else whole
        found = float((actual.double() - expected.double()).norm()) / max(scale, 1e-30)
        return math.inf if math.isnan(found) else found

    errors = {name: error(actual.gradients.get(name), g) for name, g in expected.gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    norms = error(actual.norms, expected.norms)
    if max(errors[worst], norms) > tolerance:
        wrong = sum(e > tolerance for e in errors.values())
        raise AssertionError(
            f"{wrong} of {len(errors)} gradients and {'the' if norms > tolerance else 'no'} "
            f"per-sample norms are off by more than {tolerance:g}; worst parameter "
            f"{worst.removeprefix('model.')!r}: relative error {errors[worst]:.3g}, norm "
            f"{float(expected.gradients[worst].double().norm()):.3g} of {whole:.3g} in all; "
            f"per-sample norms {actual.norms.tolist()}, expected {expected.norms.tolist()}"
        )
