"""The trade-off function."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from dpkernels.accounting import get_delta, trade_off

RUN = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 100}
ALPHAS = np.array([1e-6, 1e-3, 0.02, 0.1, 0.3, 0.5, 0.8, 0.99])


@pytest.mark.parametrize("direction", ["remove", "add", "both"])
def test_full_batch_is_gaussian(direction):
    found = trade_off(ALPHAS, noise_multiplier=4.0, sample_rate=1.0, steps=16, direction=direction)
    exact = ndtr(-ndtri(ALPHAS) - 1)
    assert (found <= exact * (1 + 1e-12)).all()
    np.testing.assert_allclose(found, exact, rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("rate", [0.01, 0.4])
def test_one_step_is_amplified_gaussian(sigma, rate):
    found = trade_off(ALPHAS, noise_multiplier=sigma, sample_rate=rate, steps=1, direction="remove")
    exact = (1 - rate) * (1 - ALPHAS) + rate * ndtr(-ndtri(ALPHAS) - 1 / sigma)
    assert (found <= exact * (1 + 1e-12)).all()
    np.testing.assert_allclose(found, exact, rtol=1e-4)


@pytest.mark.parametrize("adversary", ["worst_case", "relaxed"])
def test_curves_fall_are_convex_and_below_chance(adversary):
    alphas = np.linspace(0.0, 1.0, 21)
    for direction in ("remove", "add", "both"):
        misses = trade_off(alphas, **RUN, adversary=adversary, direction=direction)
        assert misses[0] == 1
        assert misses[-1] == 0
        assert (np.diff(misses) < 0).all()
        assert (misses <= 1 - alphas).all()
        assert (np.diff(misses, 2) > -1e-5).all()


def test_add_is_remove_read_backwards():
    misses = trade_off(ALPHAS[1:], **RUN, direction="remove")
    back = trade_off(misses, **RUN, direction="add")
    np.testing.assert_allclose(back, ALPHAS[1:], rtol=1e-3)


def test_both_is_its_own_inverse_and_the_lowest():
    both = trade_off(ALPHAS, **RUN)
    np.testing.assert_allclose(trade_off(both[1:], **RUN), ALPHAS[1:], rtol=1e-3)
    for direction in ("remove", "add"):
        assert (both <= trade_off(ALPHAS, **RUN, direction=direction) * (1 + 1e-9)).all()


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
def test_tangent_lines_are_the_privacy_profile(epsilon):
    alphas = np.exp(np.linspace(math.log(1e-7), math.log(0.5), 120))
    lines = 1 - trade_off(alphas, **RUN, direction="remove") - math.exp(epsilon) * alphas
    assert lines.max() == pytest.approx(get_delta(**RUN, epsilon=epsilon), rel=0.02)


@pytest.mark.parametrize("adversary", ["worst_case", "relaxed"])
@pytest.mark.parametrize("sigma", [1e-5, 0.02])
def test_without_noise_only_absence_protects(sigma, adversary):
    absent = 0.99**100
    found = trade_off(
        ALPHAS,
        noise_multiplier=sigma,
        sample_rate=0.01,
        steps=100,
        adversary=adversary,
        direction="remove",
    )
    np.testing.assert_allclose(found, absent * (1 - ALPHAS), rtol=1e-5)


def test_shapes_and_bad_input():
    assert isinstance(trade_off(0.1, **RUN), float)
    assert trade_off(np.full((2, 3), 0.1), **RUN).shape == (2, 3)
    assert trade_off(0.3, noise_multiplier=1, sample_rate=0, steps=1) == 0.7
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        trade_off(1.5, **RUN)
    with pytest.raises(ValueError, match="adversary='best'"):
        trade_off(0.1, **RUN, adversary="best")
    with pytest.raises(ValueError, match="direction='up'"):
        trade_off(0.1, **RUN, direction="up")
