"""A simulation of the optimal test: a cross-check of `rero_bound`, never the product's number.

Steps are drawn from a law that is tilted towards the threshold, and reweighted; drawing from the
null instead would see nothing at large budgets (docs/math.md, "Monte Carlo cross-check").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from dpkernels.accounting.checks import check_count, check_number
from dpkernels.accounting.events import Phase
from dpkernels.accounting.losses import StepLaw, step_laws
from dpkernels.accounting.tradeoff import TradeOff

_CELLS = 1 << 14


@dataclass(frozen=True)
class Simulation:
    """A simulated gamma with a confidence interval [low, high].

    Attributes:
        gamma: estimate.
        low, high: normal interval, to be trusted from some hundred effective samples on.
        effective_samples: how many equal weights the weights beyond the threshold are worth.
    """

    gamma: float
    low: float
    high: float
    effective_samples: float


def _draw(
    law: StepLaw, tilt: float, samples: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses and log of (density under the mixture / density drawn from), [samples]."""
    edges = np.linspace(*law.support(12.0), _CELLS + 1)
    width = edges[1] - edges[0]
    middles = (edges[1:] + edges[:-1]) / 2
    exponents = law.log_mixture(middles) + tilt * law.loss(middles)
    chances = np.exp(exponents - exponents.max())
    chances /= chances.sum()
    cumulative = np.cumsum(chances)
    losses, log_weights = np.zeros(samples), np.zeros(samples)
    for _ in range(law.phase.steps):
        cells = np.minimum(np.searchsorted(cumulative, generator.random(samples)), _CELLS - 1)
        x = edges[cells] + width * generator.random(samples)
        losses += law.loss(x)
        log_weights += law.log_mixture(x) - np.log(chances[cells] / width)
    return losses, log_weights


def simulate_rero(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    kappa: float,
    adversary: str = "worst_case",
    samples: int = 20_000,
    confidence: float = 0.999,
    seed: int = 0,
) -> Simulation:
    """Simulates the bound of `rero_bound`.

    Args:
        noise_multiplier, sample_rate, steps, kappa, adversary: as in `rero_bound`.
        samples: number of simulated runs, >= 100; time grows with samples * steps.
        confidence: probability that the interval covers the exact value, in (0, 1).
        seed: of numpy's generator.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    phase = Phase(noise_multiplier, check_number("sample_rate", sample_rate, above=0.0), steps)
    kappa = check_number("kappa", kappa, above=0.0, below=1.0)
    confidence = check_number("confidence", confidence, above=0.0, below=1.0)
    samples = check_count("samples", samples, at_least=100)
    (law,) = step_laws((phase,), adversary)
    tilt = TradeOff((phase,), adversary, math.log(kappa)).tilt_at_alpha(kappa)
    losses, log_mixture = _draw(law, tilt, samples, np.random.default_rng(seed))
    order = np.argsort(-losses)
    losses, log_mixture = losses[order], log_mixture[order]
    null, mixture = np.exp(log_mixture - losses), np.exp(log_mixture)
    reject = np.cumsum(null) / samples <= kappa
    threshold = float(losses[min(int(reject.sum()), samples - 1)])
    slope_terms = np.where(reject, math.exp(threshold) * null, 0.0)
    if tilt >= 0:
        gamma = float(np.where(reject, mixture, 0.0).mean())
        influence = np.where(reject, mixture, 0.0) - slope_terms
    else:
        gamma = 1 - float(np.where(reject, 0.0, mixture).mean())
        influence = np.where(reject, 0.0, mixture) + slope_terms
    error = -float(ndtri((1 - confidence) / 2)) * float(influence.std()) / math.sqrt(samples)
    weights = null[reject]
    effective = float(weights.sum() ** 2 / (weights @ weights)) if weights.size else 0.0
    return Simulation(gamma, max(0.0, gamma - error), min(1.0, gamma + error), effective)
