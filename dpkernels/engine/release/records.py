"""Records of a training step: what became of its samples, what its noise was, that it counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from opacus.optimizers import DPOptimizer


@dataclass(frozen=True)
class StepReport:
    """What happened to the samples of the last physical batch.

    Attributes:
        per_sample_norm: [B], float32 or float64: gradient norms before clipping.
        clip_factor: [B]: what each sample's gradient was multiplied by; with per-layer clipping
            [parameters, B].
    """

    per_sample_norm: torch.Tensor
    clip_factor: torch.Tensor


@dataclass(frozen=True)
class Mechanism:
    """What the noise of a logical batch was drawn for."""

    noise_multiplier: float
    bound: float


@dataclass(frozen=True)
class StepCounter:
    """Step hook that reports every step to the accountant; it pickles, unlike a closure.

    Attributes:
        accountant: an Opacus ``IAccountant``.
        sample_rate: probability q with which a record enters one backward pass.
    """

    accountant: Any
    sample_rate: float

    def __call__(self, optimizer: DPOptimizer) -> None:
        self.accountant.step(
            noise_multiplier=optimizer.noise_multiplier,
            sample_rate=self.sample_rate * optimizer.accumulated_iterations,
        )
