"""How per-sample norms become clip factors, and how much noise hides the clipped sum.

``optimizer.max_grad_norm`` owns the bound C: schedulers write the bound, clipping and noise both
read the bound at every step (docs/math.md, section 1). :class:`Clipping` holds all other settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from dpkernels import ops

#: gamma of automatic clipping (Bu et al. 2023, AUTO-S)
_AUTOMATIC_GAMMA = 0.01

#: by parameter, [B]: a value for each sample
ByParameter = dict[nn.Parameter, torch.Tensor]
#: adds noise of a standard deviation to a tensor, in place
Draw = Callable[[torch.Tensor, float], torch.Tensor]


class Clipping:
    """Flat clipping: one factor per sample, from the norm of the sample's whole gradient.

    Args:
        max_grad_norm: bound C as the user gave it.
        gamma: 0 for ``min(1, C / norm)``; > 0 for automatic clipping, ``C / (norm + gamma)``.
    """

    def __init__(self, max_grad_norm: float | Sequence[float], gamma: float = 0.0):
        if not isinstance(max_grad_norm, (int, float)):
            raise ValueError(
                f"max_grad_norm={max_grad_norm}: expected one number (a list needs "
                "clipping='per_layer')"
            )
        self.max_grad_norm = float(max_grad_norm)
        self.gamma = gamma

    def factors(self, norm_sq: ByParameter, max_grad_norm: float) -> ByParameter:
        """By parameter, [B]: the factor of each sample's gradient.

        Args:
            norm_sq: by parameter, [B]: squared norm of each sample's gradient, its margin for the
                rounding of the sum included (``ParameterGradient.bound_sq``).
            max_grad_norm: the bound C of this step.
        """
        return dict.fromkeys(
            norm_sq, ops.clip_factor(total_norm_sq(norm_sq.values()), max_grad_norm, self.gamma)
        )

    def gradient_noise(self, noise_multiplier: float) -> float:
        """The gradient's noise multiplier, where `noise_multiplier` is the whole mechanism's."""
        return noise_multiplier

    def observe(self, factors: ByParameter) -> None:
        """Take note of one physical batch's clip factors, before the batch is summed."""

    def next_bound(self, max_grad_norm: float, expected_samples: float, draw: Draw) -> float:
        """The bound of the next step, asked once per step.

        Args:
            max_grad_norm: the bound of this step.
            expected_samples: the expected number of samples of this step, which is public.
            draw: adds noise to a tensor.
        """
        return max_grad_norm

    def reset(self) -> None:
        """Forget the observed factors: gradients were cleared."""


class PerLayerClipping(Clipping):
    """A bound for every parameter tensor; the bounds' root sum of squares is ``max_grad_norm``.

    The bounds keep their proportions when a scheduler changes ``optimizer.max_grad_norm``.

    Args:
        max_grad_norms: one bound per trained parameter, in the optimizer's order.
        parameters: the trained parameters.
    """

    def __init__(
        self,
        max_grad_norms: float | list[float] | tuple[float, ...],
        parameters: Sequence[nn.Parameter],
    ):
        if not isinstance(max_grad_norms, (list, tuple)):
            max_grad_norms = [max_grad_norms]
        if len(max_grad_norms) != len(parameters):
            raise ValueError(
                f"max_grad_norm: clipping='per_layer' expects one bound for each of "
                f"{len(parameters)} trained parameters, got {len(max_grad_norms)}"
            )
        super().__init__(math.sqrt(math.fsum(float(c) ** 2 for c in max_grad_norms)))
        self.shares = {p: float(c) / self.max_grad_norm for p, c in zip(parameters, max_grad_norms)}

    def factors(self, norm_sq: ByParameter, max_grad_norm: float) -> ByParameter:
        unbounded = [p for p in norm_sq if p not in self.shares]
        if unbounded:
            raise ValueError(
                f"clipping='per_layer': a parameter of shape {tuple(unbounded[0].shape)} was "
                "unfrozen after make_private() and has no bound; call make_private() again"
            )
        return {
            p: ops.clip_factor(norm, max_grad_norm * self.shares[p]) for p, norm in norm_sq.items()
        }


@dataclass(frozen=True)
class AdaptiveSettings:
    """What ``clipping="adaptive"`` needs beside a bound.

    Attributes:
        target_unclipped_quantile: share of samples that shall stay unclipped.
        clipbound_learning_rate: how fast the bound follows, geometrically.
        max_clipbound: largest bound.
        min_clipbound: smallest bound.
        unclipped_num_std: std of the noise on the count of unclipped samples.
    """

    target_unclipped_quantile: float
    clipbound_learning_rate: float
    max_clipbound: float
    min_clipbound: float
    unclipped_num_std: float


class AdaptiveClipping(Clipping):
    """The bound follows a quantile of the norms [Andrew et al. 2021].

    Each step also releases the number of samples that were not clipped, with noise of std
    `unclipped_num_std`: a sample counts +1/2 or -1/2, so that one sample moves the count by 1/2.
    The gradient gets the rest of the budget. Unlike in Opacus, the count is divided by the expected
    number of samples: the drawn number is private under Poisson sampling.

    Args:
        max_grad_norm: the first bound.
        noise_multiplier: sigma of the whole mechanism, count and gradient together.
        settings: how the bound moves, and how the count is hidden.
    """

    def __init__(
        self,
        max_grad_norm: float | list[float],
        noise_multiplier: float,
        settings: AdaptiveSettings,
    ):
        super().__init__(max_grad_norm)
        if settings.max_clipbound <= settings.min_clipbound:
            raise ValueError("max_clipbound must be larger than min_clipbound.")
        self.settings = settings
        self._surplus = 0.0
        self._limit_above(noise_multiplier)

    def gradient_noise(self, noise_multiplier: float) -> float:
        if noise_multiplier == 0:
            return 0.0
        return (noise_multiplier**-2 - self._limit_above(noise_multiplier) ** -2) ** -0.5

    def _limit_above(self, noise_multiplier: float) -> float:
        """The noise multiplier at which the count would spend the whole budget."""
        limit = 2 * self.settings.unclipped_num_std
        if noise_multiplier >= limit:
            raise ValueError(
                f"noise_multiplier={noise_multiplier} must be smaller than 2 * unclipped_num_std "
                f"= {limit}: the noisy count would spend the whole budget "
                "(https://arxiv.org/abs/1905.03871, Theorem 1)"
            )
        return limit

    def observe(self, factors: ByParameter) -> None:
        factor = next(iter(factors.values()), torch.zeros(0))
        self._surplus += float((factor >= _UNCLIPPED).sum()) - len(factor) / 2

    def next_bound(self, max_grad_norm: float, expected_samples: float, draw: Draw) -> float:
        settings = self.settings
        surplus = float(draw(torch.tensor([self._surplus]), settings.unclipped_num_std))
        share = 0.5 + surplus / expected_samples
        step = settings.clipbound_learning_rate * (share - settings.target_unclipped_quantile)
        bound = max_grad_norm * math.exp(-step)
        return min(max(bound, settings.min_clipbound), settings.max_clipbound)

    def reset(self) -> None:
        self._surplus = 0.0


#: clip factors are rounded down by two units, so an unclipped sample's factor may be just below 1
_UNCLIPPED = 1.0 - 1e-6


def total_norm_sq(norm_sq: Any) -> torch.Tensor:
    """[B]: the sum over parameters, in their widest dtype, on the first parameter's device."""
    norms = list(norm_sq)
    widest = max((n.dtype for n in norms), key=lambda dtype: dtype.itemsize)
    stacked = torch.stack([n.to(norms[0].device, torch.float64) for n in norms])
    return stacked.sum(0).to(widest)


_KINDS = ("flat", "automatic", "per_layer", "adaptive")
_ADAPTIVE = tuple(field.name for field in fields(AdaptiveSettings))


def make_clipping(
    kind: str,
    max_grad_norm: float | list[float],
    noise_multiplier: float,
    parameters: Sequence[nn.Parameter],
    settings: Mapping[str, Any],
) -> Clipping:
    """The strategy of ``make_private(clipping=kind)``.

    Args:
        kind: ``"flat"``, ``"automatic"``, ``"per_layer"`` or ``"adaptive"``.
        max_grad_norm: bound C, or one bound per parameter.
        noise_multiplier: sigma of the mechanism.
        parameters: the trained parameters.
        settings: the other keyword arguments of ``make_private``.

    Raises:
        ValueError: a kind or setting is unknown, or a setting is out of range.
    """
    if kind not in _KINDS:
        raise ValueError(f"clipping={kind!r}: expected one of {', '.join(_KINDS)}")
    unknown = [name for name in settings if name not in _ADAPTIVE]
    if unknown:
        raise ValueError(f"make_private() got an unexpected argument {unknown[0]!r}")
    if kind == "per_layer":
        return PerLayerClipping(max_grad_norm, parameters)
    if kind != "adaptive":
        return Clipping(max_grad_norm, _AUTOMATIC_GAMMA if kind == "automatic" else 0.0)
    missing = [name for name in _ADAPTIVE if name not in settings]
    if missing:
        raise ValueError(f"clipping='adaptive' needs {', '.join(missing)}")
    return AdaptiveClipping(max_grad_norm, noise_multiplier, AdaptiveSettings(**settings))
