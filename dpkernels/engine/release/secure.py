"""``secure_mode=True``: noise that floating-point arithmetic cannot give away.

Each sample's clipped gradient is rounded to a grid, integers are summed exactly, and integer noise
is added: the released gradient is a function of an integer vector whose law is proven
(docs/math.md, section 3, "Integer noise").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpkernels.engine.processes.collectives import Processes
from dpkernels.engine.release.noisy_sum import Pass
from dpkernels.engine.release.pending import ParameterGradient
from dpkernels.ops.noise import discrete_gaussian_noise_
from dpkernels.ops.noise.source import NoiseSource
from dpkernels.ops.noise.table import VARIANCE

#: variance that the smoothing argument takes off the continuous Gaussian behind the integers
_SMOOTHING_VARIANCE = 4.0
#: relative allowance for float64 rounding of norms and products; actual rounding stays far below
_SLACK = 2.0**-18
#: largest norm of one sample in steps of the grid: 2^22 such samples fit into 64-bit sums
_LARGEST_STEPS = 2.0**40
#: number of gradient values that are rounded at a time, in float64
_VALUES_AT_A_TIME = 2**20


@dataclass(frozen=True)
class Grid:
    """The grid to which each sample's clipped gradient in one logical batch is rounded.

    The noise has a fixed standard deviation in steps of the grid, so the grid's width follows from
    the noise multiplier, and the sensitivity from the width.

    Attributes:
        noise_multiplier: std of the noise divided by the sensitivity, > 0.
        bound: C, the norm of a sample's clipped gradient before rounding.
        dimension: D, number of trained values.

    Raises:
        ValueError: the rounding would more than double the sensitivity, or the grid is too fine.
    """

    noise_multiplier: float
    bound: float
    dimension: int

    def __post_init__(self) -> None:
        if not self.noise_multiplier > 0.0:
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier}: secure_mode=True protects the noise, "
                "so it expects a number > 0"
            )
        if self.steps > _LARGEST_STEPS:
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier}: secure_mode=True expects at least "
                f"{math.sqrt(VARIANCE) / _LARGEST_STEPS:.1g}"
            )
        if self.steps < math.sqrt(self.dimension):
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier}: with {self.dimension} trained values "
                "rounding would more than double the sensitivity in secure_mode=True; expected at "
                f"most {self.noise_multiplier * self.steps / math.sqrt(self.dimension):.3g}"
            )

    @property
    def steps(self) -> float:
        """The sensitivity in steps of the grid: no sample's integers have a larger norm."""
        return math.sqrt(VARIANCE - _SMOOTHING_VARIANCE) / self.noise_multiplier

    @property
    def width(self) -> float:
        """One step, in units of the gradient: C_grid = C + width * sqrt(D) / 2 = steps * width."""
        return self.bound * (1.0 + _SLACK) / (self.steps - math.sqrt(self.dimension) / 2.0)

    @property
    def sensitivity(self) -> float:
        """C_grid, in units of the gradient."""
        return self.steps * self.width


class GridSum:
    """The sum of ``secure_mode=True``: integers, added up exactly, and discrete Gaussian noise.

    :meth:`norm_sq` takes norms in float64 of the very per-sample gradients that are rounded. So at
    the end of the backward pass the per-sample gradients of all parameters are stored, whatever
    strategies the planner chose.

    Guarantees:
        The integers that one sample adds have a norm of at most ``Grid.steps``, checked for every
        sample; sums are exact; the noise is within total variation 1e-33 per value of the discrete
        Gaussian with standard deviation ``noise_multiplier * Grid.steps`` (to 1e-14, upwards), and
        gradients are a function of the noisy integers.

    Args:
        source: key and counters of the noise.

    Attributes:
        grid: the grid of the logical batch under way; None before its first physical batch.
        integers: by parameter, the sum in steps of the grid.
    """

    def __init__(self, source: NoiseSource):
        self._source = source
        self.clear()

    def norm_sq(self, gradient: ParameterGradient) -> torch.Tensor:
        stored = gradient.materialize()
        rows = stored.reshape(len(stored), stored[0].numel())
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return norm.square()

    def clear(self) -> None:
        self.grid: Grid | None = None
        self.integers: dict[nn.Parameter, torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "grid": None, "integers": {}}

    def begin(self, taken: Pass) -> None:
        noise_multiplier, bound = taken.mechanism.noise_multiplier, taken.mechanism.bound
        if self.grid is None:
            self.grid = Grid(noise_multiplier, bound, sum(p.numel() for p in taken.parameters))
        elif noise_multiplier != self.grid.noise_multiplier or bound > self.grid.bound:
            raise ValueError(
                f"noise_multiplier={noise_multiplier}, max_grad_norm={bound}: the logical batch "
                f"began with {self.grid.noise_multiplier} and {self.grid.bound}, to which its "
                "grid was fitted; change them after optimizer.step()"
            )

    def write(self, taken: Pass) -> dict[nn.Parameter, torch.Tensor]:
        if self.grid is None:
            raise ValueError("write(): begin() was not called, expected it before")
        grid, rounded = self.grid, self._rounded(taken, self.grid)
        gradients = {}
        for parameter in taken.parameters:
            total = self.integers.get(parameter)
            if total is None:
                total = torch.zeros(parameter.shape, dtype=torch.int64, device=parameter.device)
                self.integers[parameter] = total
            if parameter in rounded:
                total += rounded.pop(parameter)
            if taken.noise_std:
                discrete_gaussian_noise_(total, *self._source.take_blocks(total.numel()))
            if taken.last:
                scale = grid.width / taken.divisor
                gradients[parameter] = (total.double() * scale).to(parameter.dtype)
        return gradients

    def _rounded(self, taken: Pass, grid: Grid) -> dict[nn.Parameter, torch.Tensor]:
        """By parameter, the sum of the samples' integers; no sample exceeds the sensitivity."""
        rounded: dict[nn.Parameter, torch.Tensor] = {}
        norm_sq = torch.zeros(1, dtype=torch.float64)
        for parameter, factor in taken.factors.items():
            stored = taken.gradients[parameter].materialize()
            weight = (factor / grid.width).to(stored.device)
            rounded[parameter], squares = rounded_sum(stored, weight)
            norm_sq = norm_sq + squares.cpu()
        if float(norm_sq.max()) * (1.0 + _SLACK / 4) > grid.steps**2:
            raise ValueError(
                f"max_grad_norm={taken.mechanism.bound}: a sample's integers exceed the "
                f"sensitivity of {grid.steps} steps, so nothing was released; parameters were "
                "unfrozen within a logical batch, or this is a fault of the engine: please report "
                "it"
            )
        return rounded


def check_secure(clipping: str, processes: Processes, generator: torch.Generator | None) -> None:
    """Raise ``ValueError`` naming the setting with which ``secure_mode=True`` cannot work."""
    if clipping == "adaptive":
        raise ValueError(
            "clipping='adaptive': its noisy count is not on the grid of secure_mode=True; use "
            "'flat', 'per_layer' or 'automatic'"
        )
    if processes.world_size > 1:
        raise ValueError(
            f"secure_mode=True: {processes.world_size} processes train together, and its "
            "integers are summed in one; train in one process, or without secure_mode"
        )
    if generator is not None:
        raise ValueError("Passing seed is prohibited in secure mode")


def rounded_sum(stored: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each sample's weighted gradient to integers, then add them up exactly.

    Args:
        stored: [B, *shape], per-sample gradients.
        weight: [B] float64; samples of weight 0 are not read.

    Returns:
        [*shape] int64, the sum of all integers; [B] float64, squared norms of samples' integers.
    """
    total = torch.zeros(stored.shape[1:], dtype=torch.int64, device=stored.device)
    squares = torch.zeros(len(stored), dtype=torch.float64, device=stored.device)
    at_a_time = max(1, _VALUES_AT_A_TIME // max(1, total.numel()))
    for rows in weight.nonzero().flatten().split(at_a_time):
        shape = (-1, *(1 for _ in total.shape))
        integers = (stored[rows].double() * weight[rows].double().reshape(shape)).round_()
        squares[rows] = integers.square().reshape(len(integers), total.numel()).sum(1)
        total += integers.to(torch.int64).sum(0)
    return total, squares
