"""The public functions: epsilon, delta and noise under any accountant."""

from __future__ import annotations

import math
from collections.abc import Iterable

from dpkernels.accounting import tight
from dpkernels.accounting.accountants import accountant_named
from dpkernels.accounting.checks import check_count, check_number
from dpkernels.accounting.events import Phase, as_history

_ROUND_UP = 1e-6


def get_epsilon(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: str = "tight",
) -> float:
    """Epsilon of DP-SGD with Poisson sampling, add/remove neighbours.

    Args:
        noise_multiplier: std of the noise divided by max_grad_norm, > 0.
        sample_rate: probability that a record joins a step, in [0, 1].
        steps: number of steps, an integer >= 1.
        delta: in (0, 1).
        accountant: "tight" (ours), Opacus' "rdp", "prv", "gdp" at their defaults, or the name of
            an accountant that `register_accountant` has added.

    Returns:
        Epsilon >= 0.

    Raises:
        ValueError: naming the argument that is out of range, or the accountant that cannot answer.

    Guarantees:
        Under "tight", never below the exact epsilon and at most 1 % above it
        (docs/math.md, "Accounting").
    """
    return get_history_epsilon(
        [Phase(noise_multiplier, sample_rate, steps)], delta=delta, accountant=accountant
    )


def get_history_epsilon(
    history: Iterable[Phase | tuple[float, float, int]],
    *,
    delta: float,
    accountant: str = "tight",
) -> float:
    """Epsilon of a run whose noise multiplier or sample rate changed on the way.

    Args:
        history: phases, or (noise_multiplier, sample_rate, steps) tuples as Opacus keeps them.
        delta: in (0, 1).
        accountant: as in `get_epsilon`.

    Returns:
        Epsilon >= 0; 0 for an empty history.

    Raises:
        ValueError: as `get_epsilon`.
    """
    chosen = accountant_named(accountant)
    check_number("delta", delta, above=0.0, below=1.0)
    phases = as_history(history)
    return chosen.epsilon(phases, float(delta)) if phases else 0.0


def get_delta(*, noise_multiplier: float, sample_rate: float, steps: int, epsilon: float) -> float:
    """Delta of DP-SGD at a given epsilon, under the tight accountant.

    Args:
        noise_multiplier: std of the noise divided by max_grad_norm, > 0.
        sample_rate: in [0, 1].
        steps: an integer >= 1.
        epsilon: > 0.

    Returns:
        An upper bound on delta, in [0, 1]; accurate down to about 1e-20.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    history = as_history([Phase(noise_multiplier, sample_rate, steps)])
    check_number("epsilon", epsilon, above=0.0)
    return min(1.0, math.exp(tight.log_delta(history, float(epsilon))) * (1 + _ROUND_UP))


def get_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "tight",
) -> float:
    """The noise multiplier that a budget needs.

    Args:
        target_epsilon: in [1e-2, 1e15].
        target_delta: in (0, 1), below the probability that a record joins any step at all.
        sample_rate: probability that a record joins a step, in (0, 1].
        steps: number of steps, an integer >= 1.
        accountant: as in `get_epsilon`; a nominal budget of the literature means the noise of
            *its* accountant (docs/accounting.md).

    Returns:
        Noise multiplier > 0.

    Raises:
        ValueError: naming the argument that is out of range, or the accountant that cannot answer.

    Guarantees:
        `get_epsilon` at the returned value, under the same accountant, is at most target_epsilon.
        Under "tight" the value is at most 0.5 % above the exact one.
    """
    chosen = accountant_named(accountant)
    check_number("target_epsilon", target_epsilon, at_least=1e-2, at_most=1e15)
    check_number("target_delta", target_delta, above=0.0, below=1.0)
    check_number("sample_rate", sample_rate, above=0.0, at_most=1.0)
    steps = check_count("steps", steps)
    return chosen.noise_multiplier(
        float(target_epsilon), float(target_delta), float(sample_rate), steps
    )
