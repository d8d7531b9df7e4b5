"""The tolerance of Opacus' noise test: honest noise passes, noise of another level does not."""

from __future__ import annotations

import unittest

import mpmath
import numpy as np
import pytest
from torch import nn

from tests.opacus_compat.noise_level import FALSE_ALARM, bounds, judge_by_chance

#: numbers of parameters in Opacus' test models, and one
MODELS = (1, 160, 972, 1097, 11970, 13042)


@pytest.mark.parametrize("parameters", MODELS)
def test_honest_noise_fails_less_than_once_in_a_million_runs(parameters: int) -> None:
    """Tails of the chi-squared law by another library, for 100 examples of 15 classes, twice."""
    half = mpmath.mpf(parameters) / 2
    low, high = (mpmath.mpf(bound) * half for bound in bounds(parameters))
    below = mpmath.gammainc(half, 0, low, regularized=True)
    above = mpmath.gammainc(half, high, regularized=True)
    assert below == pytest.approx(FALSE_ALARM / 2, rel=1e-6)
    assert above == pytest.approx(FALSE_ALARM / 2, rel=1e-6)
    assert 100 * 15 * 2 * FALSE_ALARM < 1e-6


class Trained(unittest.TestCase):
    """Opacus' test as far as :func:`judge_by_chance` reaches into it."""

    def _init_private_training(self, parameters: int) -> tuple[nn.Module]:
        frozen = nn.Linear(3, 3).requires_grad_(False)
        return (nn.Sequential(frozen, nn.Linear(parameters, 1, bias=False)),)


def judged(parameters: int, level: float) -> bool:
    """Whether noise of `level` times the standard deviation that was asked for passes."""
    test = Trained()
    judge_by_chance(test)
    test._init_private_training(parameters=parameters)
    noise = 0.3 * level * np.random.default_rng(parameters).standard_normal(parameters)
    expected = 0.09 * parameters
    almost_equal = test.assertAlmostEqual
    try:
        almost_equal((noise**2).sum(), expected, delta=0.15 * expected)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(("parameters", "wrong"), [(160, 1.5), (972, 1.2), (13042, 1.06)])
def test_noise_of_another_level_is_refused(parameters: int, wrong: float) -> None:
    assert judged(parameters, 1.0)
    assert not judged(parameters, wrong)
    assert not judged(parameters, 1 / wrong)
