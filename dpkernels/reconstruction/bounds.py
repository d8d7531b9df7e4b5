"""Reconstruction robustness: bounds on gamma, the probability that a reconstruction succeeds.

`kappa` is the probability of success without the model, for instance 1 / n when the attacker has
to pick the record out of n candidates. Every function returns an upper bound on gamma
(docs/math.md, "Reconstruction robustness").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import chi2, ncx2

from dpkernels.accounting.checks import check_count, check_number
from dpkernels.accounting.events import History, Phase, as_history
from dpkernels.accounting.losses import ADVERSARIES
from dpkernels.accounting.tradeoff import optimal_test

_ROUND_UP = 1 + 1e-9


def _check_kappa(kappa: float) -> float:
    return check_number("kappa", kappa, above=0.0, below=1.0)


def likelihood_ratio_bound(*, noise_multiplier: float, kappa: float, dimension: int) -> float:
    """Gamma of the adversary who knows only the size of a d-dimensional gradient; one full batch.

    The likelihood ratio rises with the norm of the observation, a chi-square with or without
    non-centrality; gamma is the larger of the two directions.

    Args:
        noise_multiplier: std of the noise divided by max_grad_norm, > 0.
        kappa: success without the model, in (0, 1).
        dimension: number of gradient coordinates d, >= 1.

    Returns:
        Gamma in [kappa, 1].

    Raises:
        ValueError: naming the argument that is out of range, or where the chi-square laws cannot
            be computed.
    """
    sigma = check_number("noise_multiplier", noise_multiplier, above=0.0)
    kappa = _check_kappa(kappa)
    d = check_count("dimension", dimension)
    shift = 1 / sigma
    if d == 1:
        low = float(ndtri(kappa / 2))
        middle = float(ndtri(0.5 + kappa / 2))
        forward = float(ndtr(low + shift) + ndtr(low - shift))
        reverse = _central_mass_bound(shift, kappa, middle)
    else:
        forward = float(ncx2.sf(chi2.isf(kappa, d), d, shift**2))
        reverse = float(chi2.cdf(ncx2.ppf(kappa, d, shift**2), d))
    if not (math.isfinite(forward) and math.isfinite(reverse)):
        raise ValueError(
            f"dimension={dimension!r}: no bound can be proved at noise_multiplier="
            f"{noise_multiplier!r}, the non-central chi-square law overflows; expected a larger "
            "noise_multiplier, or adversary='worst_case'"
        )
    return min(1.0, max(kappa, forward, reverse) * _ROUND_UP)


def _central_mass_bound(shift: float, kappa: float, width: float) -> float:
    """Null mass of [-r, r] where the shifted law has mass kappa there."""
    low, high = 0.0, max(width, 1.0) + shift
    while ndtr(high - shift) - ndtr(-high - shift) < kappa:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if ndtr(middle - shift) - ndtr(-middle - shift) < kappa:
            low = middle
        else:
            high = middle
    return float(1 - 2 * ndtr(-high))


def chosen_history(
    noise_multiplier: float | None,
    sample_rate: float | None,
    steps: int | None,
    history: Iterable[Phase | tuple[float, float, int]] | None,
) -> History:
    """The history that a caller meant: given as such, or as one phase.

    Raises:
        ValueError: if neither or both are given, or a value is out of range.
    """
    single = {"noise_multiplier": noise_multiplier, "sample_rate": sample_rate, "steps": steps}
    if history is not None:
        given = [name for name, value in single.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]}={single[given[0]]!r}: expected None beside history")
        return as_history(history)
    if noise_multiplier is None or sample_rate is None or steps is None:
        missing = [name for name, value in single.items() if value is None]
        raise ValueError(f"{missing[0]}=None: expected a number, or a history instead")
    return as_history([Phase(noise_multiplier, sample_rate, steps)])


def rero_bound(
    *,
    noise_multiplier: float | None = None,
    sample_rate: float | None = None,
    steps: int | None = None,
    kappa: float,
    adversary: str = "worst_case",
    dimension: int = 1,
    history: Iterable[Phase | tuple[float, float, int]] | None = None,
) -> float:
    """Upper bound on the probability that a reconstruction of one record succeeds.

    Args:
        noise_multiplier: std of the noise divided by max_grad_norm, > 0.
        sample_rate: probability that a record joins a step, in [0, 1].
        steps: number of steps, an integer >= 1.
        kappa: success without the model, in (0, 1).
        adversary: "worst_case" knows the record's gradient up to whether it was there;
            "relaxed" knows its size only.
        dimension: gradient coordinates that the relaxed adversary is uncertain about. Above 1
            only one full-batch step has a proven bound.
        history: phases or (noise_multiplier, sample_rate, steps) tuples, instead of the three
            arguments above.

    Returns:
        Gamma in [kappa, 1 - (1 - sample_rate)^steps * (1 - kappa)].

    Raises:
        ValueError: naming the argument that is out of range, or the bound that is not proven.

    Guarantees:
        Never below the exact bound and at most a relative 1e-4 above it.
    """
    kappa = _check_kappa(kappa)
    dimension = check_count("dimension", dimension)
    if adversary not in ADVERSARIES:
        raise ValueError(f"adversary={adversary!r}: expected one of {sorted(ADVERSARIES)}")
    phases = chosen_history(noise_multiplier, sample_rate, steps, history)
    if dimension > 1 and adversary == "worst_case":
        raise ValueError(
            f"dimension={dimension!r}: expected 1 for adversary='worst_case', who knows the "
            "direction and gains nothing from the other coordinates"
        )
    one_full_batch = sum(p.steps for p in phases) == 1 and phases[0].sample_rate == 1
    if adversary == "relaxed" and one_full_batch:
        return likelihood_ratio_bound(
            noise_multiplier=phases[0].noise_multiplier, kappa=kappa, dimension=dimension
        )
    if dimension > 1:
        raise ValueError(
            f"dimension={dimension!r}: a bound for more than one dimension is proven for a single "
            "full-batch step only (sample_rate=1, steps=1); expected dimension=1, whose bound "
            "holds for every dimension"
        )
    return optimal_test(phases, kappa, adversary).power


def pure_dp_bound(*, kappa: float, epsilon: float) -> float:
    """Gamma of any epsilon-DP mechanism: kappa * e^epsilon."""
    kappa = _check_kappa(kappa)
    epsilon = check_number("epsilon", epsilon, at_least=0.0)
    return math.exp(min(0.0, math.log(kappa) + epsilon))


def rdp_bound(*, kappa: float, order: float, rdp: float) -> float:
    """Gamma of any (order, rdp)-Renyi-DP mechanism: (kappa * e^rdp)^((order - 1) / order)."""
    kappa = _check_kappa(kappa)
    order = check_number("order", order, above=1.0)
    rdp = check_number("rdp", rdp, at_least=0.0)
    return math.exp(min(0.0, (math.log(kappa) + rdp) * (order - 1) / order))


def profile_bound(*, kappa: float, epsilons: Sequence[float], deltas: Sequence[float]) -> float:
    """Gamma from points of a privacy profile: the least e^epsilon * kappa + delta.

    Args:
        kappa: success without the model, in (0, 1).
        epsilons: any finite numbers.
        deltas: delta at each epsilon, in [0, 1].

    Raises:
        ValueError: naming the argument that is out of range.
    """
    kappa = _check_kappa(kappa)
    if len(epsilons) != len(deltas) or not len(epsilons):
        raise ValueError(
            f"deltas: got {len(deltas)} values for {len(epsilons)} epsilons; expected as many, "
            "and at least one"
        )
    for epsilon, delta in zip(epsilons, deltas, strict=True):
        check_number("epsilons", epsilon)
        check_number("deltas", delta, at_least=0.0, at_most=1.0)
    with np.errstate(over="ignore"):
        bounds = kappa * np.exp(np.asarray(epsilons, np.float64)) + np.asarray(deltas, np.float64)
    return float(min(1.0, bounds.min()))
