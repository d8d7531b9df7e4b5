"""Records of a training step: its samples' norms and factors, its mechanism, its counting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from opacus.optimizers import DPOptimizer


@dataclass(frozen=True)
class StepReport:
    """Norms and clip factors of the samples of the last physical batch.

    Attributes:
        per_sample_norm: [B], float32 or float64: gradient norms before clipping.
        clip_factor: [B]: clip factor of each sample's gradient; with per-layer clipping
            [parameters, B].
    """

    per_sample_norm: torch.Tensor
    clip_factor: torch.Tensor


@dataclass(frozen=True)
class Mechanism:
    """The noise multiplier and the bound C for which a logical batch's noise is drawn."""

    noise_multiplier: float
    bound: float


@dataclass(frozen=True)
class StepCounter:
    """Step hook that reports every step to the accountant; a class, as a closure does not pickle.

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
