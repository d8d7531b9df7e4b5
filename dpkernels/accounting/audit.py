"""What a one-run audit proves: a lower bound on epsilon from correct guesses.

Steinke, Nasr, Jagielski 2023, "Privacy auditing with one (1) training run", Theorem 5.2: each of
m canaries is included by a fair coin, an auditor guesses r of the coins from what was released and
is right about v of them (docs/math.md, section 4, "Audit").
"""

from __future__ import annotations

import numpy as np
from scipy.special import bdtrc, expit

from dpkernels.accounting.checks import check_count, check_number

#: epsilons tried between 0 and the first one that is surely consistent
_GRID = 128
_BISECTIONS = 40


def audit_p_value(
    *, canaries: int, guesses: int, correct: int, epsilon: float, delta: float
) -> float:
    """Probability, at most, of so many correct guesses if the mechanism is (epsilon, delta)-DP.

    Args:
        canaries: m, how many coins were flipped.
        guesses: r, how many of them were guessed; fixed before the scores were seen.
        correct: v, how many guesses were right.
        epsilon: >= 0, for adding or removing one canary.
        delta: in [0, 1).

    Returns:
        An upper bound, in (0, 1].

    Raises:
        ValueError: an argument is out of range.
    """
    check_count("canaries", canaries)
    check_count("guesses", guesses)
    check_count("correct", correct, at_least=0)
    check_number("epsilon", epsilon, at_least=0.0)
    check_number("delta", delta, at_least=0.0, below=1.0)
    if guesses > canaries:
        raise ValueError(f"guesses={guesses}: expected at most canaries={canaries}")
    if correct > guesses:
        raise ValueError(f"correct={correct}: expected at most guesses={guesses}")
    accuracy = float(expit(epsilon))
    by_epsilon = float(bdtrc(correct - 1, guesses, accuracy))
    fewer = np.arange(1, correct + 1)
    just_below = bdtrc(correct - fewer - 1, guesses, accuracy) - by_epsilon
    by_delta = float(np.max(just_below / fewer, initial=0.0))
    return min(1.0, by_epsilon + 2.0 * canaries * delta * by_delta)


def audit_epsilon(
    *, canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95
) -> float:
    """The largest epsilon below which the guesses contradict (epsilon, delta)-DP.

    Args:
        canaries: m, how many coins were flipped.
        guesses: r, how many of them were guessed; fixed before the scores were seen.
        correct: v, how many guesses were right.
        delta: in [0, 1).
        confidence: in (0, 1).

    Returns:
        A lower bound on epsilon, >= 0, that exceeds the true one with probability at most
        ``1 - confidence``.

    Raises:
        ValueError: an argument is out of range.
    """
    check_number("confidence", confidence, above=0.0, below=1.0)

    def refuted(epsilon: float) -> bool:
        p_value = audit_p_value(
            canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta
        )
        return p_value < 1.0 - confidence

    if not refuted(0.0):
        return 0.0
    consistent = 1.0
    while refuted(consistent):
        consistent *= 2.0
    grid = np.linspace(0.0, consistent, _GRID + 1)
    first = next(i for i, epsilon in enumerate(grid) if not refuted(float(epsilon)))
    low, high = float(grid[first - 1]), float(grid[first])
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
