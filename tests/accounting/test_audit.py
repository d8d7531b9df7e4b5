"""The one-run audit's bound: exact on randomised response, never above the truth too often."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from dpkernels.accounting.audit import audit_epsilon, audit_p_value


@pytest.mark.parametrize("count", [10, 300])
@pytest.mark.parametrize("confidence", [0.5, 0.99])
def test_all_right_has_a_closed_form(count: int, confidence: float) -> None:
    """P[all right] = accuracy^r, accuracy = 1 / (1 + e^-epsilon)."""
    accuracy = (1 - confidence) ** (1 / count)
    found = audit_epsilon(
        canaries=count, guesses=count, correct=count, delta=0.0, confidence=confidence
    )
    assert found == pytest.approx(max(0.0, math.log(accuracy / (1 - accuracy))), abs=1e-6)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("confidence", [0.9, 0.999])
def test_a_mechanism_that_reveals_all_it_may_is_rarely_accused(
    delta: float, epsilon: float, confidence: float
) -> None:
    """Randomised response that shows a coin with probability delta: coverage summed exactly.

    Without delta the bound is sharp: one more right guess would accuse it more often.
    """
    count = 80
    accuracy = delta + (1 - delta) / (1 + math.exp(-epsilon))
    accused = [
        correct
        for correct in range(count + 1)
        if audit_epsilon(
            canaries=count, guesses=count, correct=correct, delta=delta, confidence=confidence
        )
        > epsilon
    ]
    assert accused == list(range(count + 1 - len(accused), count + 1))
    assert float(binom.pmf(accused, count, accuracy).sum()) <= 1 - confidence
    if delta == 0.0:
        assert float(binom.sf(count - len(accused) - 1, count, accuracy)) > 1 - confidence


def p_value_by_hand(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 read aloud, one probability at a time."""
    accuracy = 1 / (1 + math.exp(-epsilon))
    mass = [math.comb(r, k) * accuracy**k * (1 - accuracy) ** (r - k) for k in range(r + 1)]
    worst = max((sum(mass[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, sum(mass[v:]) + 2 * m * delta * worst)


def test_p_value_is_the_theorem() -> None:
    for r, v in ((1, 0), (1, 1), (7, 5), (40, 33), (40, 40)):
        for epsilon, delta in ((0.0, 0.0), (0.7, 1e-3), (4.0, 0.2)):
            found = audit_p_value(canaries=50, guesses=r, correct=v, epsilon=epsilon, delta=delta)
            assert found == pytest.approx(p_value_by_hand(50, r, v, epsilon, delta), abs=1e-12)


def test_more_right_guesses_prove_more_and_delta_explains_some() -> None:
    bounds = [
        audit_epsilon(canaries=200, guesses=100, correct=v, delta=1e-6) for v in range(40, 101)
    ]
    assert bounds[0] == 0.0
    assert all(np.diff(bounds) >= 0)
    assert bounds[-1] > 3.0
    for looser in ({"delta": 1e-3}, {"canaries": 20_000, "delta": 1e-5}, {"confidence": 0.999}):
        arguments = {"canaries": 200, "guesses": 100, "correct": 100, "delta": 1e-6, **looser}
        assert audit_epsilon(**arguments) < bounds[-1]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("canaries", 0, "canaries=0"),
        ("guesses", 21, "guesses=21: expected at most canaries=20"),
        ("correct", 11, "correct=11: expected at most guesses=10"),
        ("correct", 1.5, "correct=1.5"),
        ("delta", 1.0, "delta=1.0"),
        ("confidence", 1.0, "confidence=1.0"),
    ],
)
def test_bad_input_is_named(name: str, value: float, expected: str) -> None:
    arguments = {"canaries": 20, "guesses": 10, "correct": 9, "delta": 0.0, "confidence": 0.9}
    with pytest.raises(ValueError, match=expected):
        audit_epsilon(**{**arguments, name: value})
