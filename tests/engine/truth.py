"""The ground truth: one sample at a time through plain autograd, and the comparison with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dpkernels.engine.module import FusedGradSampleModule
from dpkernels.engine.release.optimizer import FusedDPOptimizer

LossFunction = Callable[[nn.Module, tuple[torch.Tensor, ...]], torch.Tensor]


@dataclass(frozen=True)
class Released:
    """Gradients by parameter name and the norms before clipping, [B]."""

    gradients: dict[str, torch.Tensor]
    norms: torch.Tensor


def microbatching(
    model: nn.Module,
    loss_function: LossFunction,
    batch: tuple[torch.Tensor, ...],
    max_grad_norm: float,
    *,
    views: int = 1,
    batch_axis: int = 0,
    expected_batch_size: float | None = None,
) -> Released:
    """Clip each sample's gradient on its own and sum; a sample is `views` adjacent rows."""
    model = copy.deepcopy(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = batch[0].shape[batch_axis]
    samples = rows // views
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    norms = []
    for b in range(samples):
        model.zero_grad()
        sample = tuple(
            t.narrow(batch_axis if t.ndim > batch_axis else 0, b * views, views) for t in batch
        )
        loss_function(model, sample).backward()
        own = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
        norm = torch.sqrt(sum(g.square().sum() for g in own.values()))
        factor = torch.clamp(max_grad_norm / norm, max=1.0)
        for name, gradient in own.items():
            total[name] += factor * gradient
        norms.append(norm.detach())
    denominator = samples if expected_batch_size is None else expected_batch_size
    return Released(
        {name: t / denominator for name, t in total.items()},
        torch.stack(norms) if norms else torch.zeros(0),
    )


def fused(
    model: nn.Module,
    loss_function: LossFunction,
    batch: tuple[torch.Tensor, ...],
    max_grad_norm: float,
    *,
    views: int = 1,
    batch_axis: int = 0,
    expected_batch_size: float | None = None,
) -> Released:
    """The same through the engine, noise off."""
    model = copy.deepcopy(model)
    samples = batch[0].shape[batch_axis] // views
    wrapped = FusedGradSampleModule(model, batch_first=batch_axis == 0, views_per_sample=views)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = FusedDPOptimizer(
        torch.optim.SGD(list(trained.values()), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        expected_batch_size=samples if expected_batch_size is None else expected_batch_size,
        views_per_sample=views,
    )
    wrapped.connect(optimizer)
    loss_function(wrapped, batch).backward()
    return Released(
        {name: p.grad for name, p in trained.items()}, optimizer.last_step.per_sample_norm
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()).clamp(min=1e-30))


def assert_same(actual: Released, expected: Released, tolerance: float = 1e-9) -> None:
    """Every gradient and norm agrees, relative to the whole gradient's norm.

    A parameter whose true gradient is rounding noise (a bias before an instance norm) is judged
    against the whole gradient, not against its own noise.
    """
    whole = torch.sqrt(sum(g.double().square().sum() for g in expected.gradients.values()))
    assert float(whole) > 0.0, "the comparison needs a gradient that is not zero"
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        difference = torch.linalg.vector_norm(actual.gradients[name].double() - gradient.double())
        own = torch.linalg.vector_norm(gradient.double())
        scale = own if own > 1e-6 * whole else whole
        assert float(difference / scale) <= tolerance, (
            f"{name}: relative error {float(difference / scale):.3g} > {tolerance:g}, "
            f"norm {float(own):.3g} of {float(whole):.3g}"
        )
    error = relative_error(actual.norms, expected.norms)
    assert error <= tolerance, (
        f"norms differ by {error:.3g}: {actual.norms.tolist()} for {expected.norms.tolist()}"
    )


def assert_private(
    model: nn.Module,
    loss_function: LossFunction,
    batch: tuple[torch.Tensor, ...],
    max_grad_norm: float | None = None,
    *,
    tolerance: float = 1e-9,
    **geometry: int,
) -> None:
    """The engine releases what microbatching releases; C clips about half of the samples."""
    if max_grad_norm is None:
        norms = microbatching(model, loss_function, batch, 1.0, **geometry).norms
        max_grad_norm = float(norms.median())
    expected = microbatching(model, loss_function, batch, max_grad_norm, **geometry)
    actual = fused(model, loss_function, batch, max_grad_norm, **geometry)
    assert_same(actual, expected, tolerance)
