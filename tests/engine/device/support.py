"""A private step on a device, and the same by one sample at a time in float64 on the CPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine
from dpkernels.engine.release.optimizer import FusedDPOptimizer
from tests.engine.support import squared_loss
from tests.engine.truth import Released, microbatching

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Private:
    """A model on a device, made private; `model` is the one inside the wrapper."""

    model: nn.Module
    engine: PrivacyEngine
    wrapped: nn.Module
    optimizer: FusedDPOptimizer

    def released(self) -> Released:
        """What the last backward pass left, on the CPU."""
        report = self.optimizer.last_step
        return Released(
            {n: p.grad.cpu() for n, p in self.model.named_parameters() if p.requires_grad},
            torch.zeros(0) if report is None else report.per_sample_norm.cpu(),
            self.optimizer.max_grad_norm,
        )

    def contribution(self) -> torch.Tensor:
        """Norm of the whole released gradient in float64, a scalar on the device."""
        gradients = [p.grad.double().flatten() for p in self.model.parameters() if p.requires_grad]
        return torch.linalg.vector_norm(torch.cat(gradients))

    def strategies(self) -> set[str]:
        return {row["strategy"] for row in self.engine.explain().rows}


def private(
    model: nn.Module,
    x: torch.Tensor,
    device: torch.device,
    bound: float,
    *,
    noise: float = 0.0,
    secure_mode: bool = False,
    **arguments: Any,
) -> Private:
    """A private copy of `model` on `device`; batches have the size of `x`, C is `bound`."""
    model = copy.deepcopy(model).to(device)
    engine = PrivacyEngine(secure_mode=secure_mode)
    wrapped, optimizer, _ = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x), batch_size=len(x)), noise_multiplier=noise,
        max_grad_norm=bound, **arguments,
    )  # fmt: skip
    return Private(model, engine, wrapped, optimizer)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Autocast on `device`; none where `dtype` is None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def backward(
    made: Private,
    x: torch.Tensor,
    dtype: torch.dtype | None = None,
    *,
    inside: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """One backward pass under autocast to `dtype`, called inside or outside of it."""
    with autocast(x.device, dtype):
        output = made.wrapped(x)
    output = output[0] if isinstance(output, tuple) else output
    loss = squared_loss(lambda _: output.float(), (x,))
    loss = loss if scaler is None else scaler.scale(loss)
    with autocast(x.device, dtype if inside else None):
        loss.backward()


def truth(model: nn.Module, x: torch.Tensor, bound: float | None = None) -> tuple[Released, float]:
    """Microbatching in float64 on the CPU and its C, which clips about half of the samples."""
    model = copy.deepcopy(model).cpu().double()
    x = x.cpu().double() if x.is_floating_point() else x.cpu()
    if bound is None:
        bound = float(microbatching(model, squared_loss, (x,), 1.0).norms.median())
    return microbatching(model, squared_loss, (x,), bound), bound


def error_of(found: Released, expected: Released) -> float:
    """Norm of the difference of the whole gradients over the norm of the expected one."""
    assert found.gradients.keys() == expected.gradients.keys()
    names = list(expected.gradients)
    flat = [
        torch.cat([each.gradients[n].double().flatten() for n in names])
        for each in (found, expected)
    ]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())
