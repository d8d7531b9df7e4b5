"""Properties that hold for every configuration in the supported range."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr, ndtr

from dpkernels.accounting import (
    get_delta,
    get_epsilon,
    get_history_epsilon,
    get_noise_multiplier,
    trade_off,
)
from dpkernels.accounting.events import Phase
from dpkernels.accounting.participation import ParticipationMixture
from dpkernels.accounting.profile import Profile
from dpkernels.accounting.tight import log_saturation

SLACK = 1.002
few = settings(max_examples=25, deadline=None, derandomize=True)


def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(math.log(low), math.log(high)).map(math.exp)


rates = log_uniform(1e-5, 1.0).map(lambda rate: min(rate, 1.0))
steps = log_uniform(1, 1e5).map(int)
deltas = log_uniform(1e-12, 1e-3)
sigmas = log_uniform(0.3, 30)
budgets = log_uniform(1e-2, 1e15)


@few
@given(sigma=sigmas, rate=rates, count=steps, delta=deltas)
def test_epsilon_is_monotone_in_every_argument(sigma, rate, count, delta):
    def spent(sigma=sigma, rate=rate, count=count, delta=delta):
        return get_epsilon(noise_multiplier=sigma, sample_rate=rate, steps=count, delta=delta)

    here = spent()
    assert spent(sigma=1.1 * sigma) <= here * SLACK
    assert spent(rate=rate / 1.2) <= here * SLACK
    assert spent(delta=1.5 * delta) <= here * SLACK
    assert spent(count=2 * count) * SLACK >= here


@few
@given(epsilon=budgets, rate=rates, count=steps, delta=deltas)
def test_calibration_keeps_the_budget_and_wastes_little(epsilon, rate, count, delta):
    if math.log(delta) >= log_saturation((Phase(1.0, rate, count),)):
        with pytest.raises(ValueError, match="target_delta="):
            get_noise_multiplier(
                target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=count
            )
        return
    sigma = get_noise_multiplier(
        target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=count
    )
    run = {"sample_rate": rate, "steps": count, "delta": delta}
    assert get_epsilon(noise_multiplier=sigma, **run) <= epsilon
    assert get_epsilon(noise_multiplier=sigma / 1.005, **run) > epsilon


def _one_step(sigma: float, rate: float, epsilon: float) -> float:
    """Delta of one subsampled step in closed form: amplification of the Gaussian's profile."""
    inner = math.log1p(math.expm1(epsilon) / rate)
    mu = 1 / sigma
    a, b = inner / mu - mu / 2, inner / mu + mu / 2
    return rate * (math.exp(log_ndtr(-a)) - math.exp(inner + log_ndtr(-b)))


@few
@given(sigma=log_uniform(0.2, 5), rate=rates, epsilon=log_uniform(0.05, 5))
def test_one_step_matches_the_closed_form(sigma, rate, epsilon):
    exact = _one_step(sigma, rate, epsilon)
    if exact < 1e-12:
        return
    found = get_delta(noise_multiplier=sigma, sample_rate=rate, steps=1, epsilon=epsilon)
    assert exact <= found <= 1.02 * exact
    spent = get_epsilon(noise_multiplier=sigma, sample_rate=rate, steps=1, delta=exact)
    assert epsilon <= spent <= 1.01 * epsilon


@pytest.mark.parametrize(
    ("sigma", "rate", "count"), [(1.0, 0.1, 50), (2.0, 0.5, 20), (5.0, 0.3, 400), (3.0, 0.02, 900)]
)
@pytest.mark.parametrize("epsilon", [0.05, 0.3, 1.0])
def test_delta_covers_both_directions(sigma, rate, count, epsilon):
    profile = Profile((Phase(sigma, rate, count),), math.log(1e-4))
    assert epsilon < profile.add_limit
    remove, add = (profile._directed_log_delta(epsilon, reverse) for reverse in (False, True))
    run = {"noise_multiplier": sigma, "sample_rate": rate, "steps": count}
    assert get_delta(**run, epsilon=epsilon) >= 0.99 * math.exp(max(remove, add))
    misses = trade_off(np.linspace(0.001, 0.999, 60), **run, direction="add")
    tangent = 1 - misses - math.exp(epsilon) * np.linspace(0.001, 0.999, 60)
    assert tangent.max() <= 1.01 * math.exp(add) + 1e-5


def test_add_direction_of_one_step_in_closed_form():
    sigma, rate, epsilon = 1.0, 0.9, 0.5
    kept = 1 - math.exp(epsilon) * (1 - rate)
    inner = epsilon + math.log(rate / kept)
    a, b = inner * sigma - 1 / (2 * sigma), inner * sigma + 1 / (2 * sigma)
    exact = kept * (ndtr(-a) - math.exp(inner) * ndtr(-b))
    found = Profile((Phase(sigma, rate, 1),), math.log(1e-4))._directed_log_delta(epsilon, True)
    assert exact <= math.exp(found) <= 1.01 * exact


@pytest.mark.parametrize(("rate", "count"), [(0.01, 5000), (0.1, 300), (1e-4, 20000)])
@pytest.mark.parametrize("sigma", [0.02, 0.04, 0.06, 0.1])
def test_regimes_meet_at_their_boundary(sigma, rate, count):
    delta = 1e-6
    composed = Profile((Phase(sigma, rate, count),), math.log(delta)).epsilon(math.log(delta))
    chosen = get_epsilon(noise_multiplier=sigma, sample_rate=rate, steps=count, delta=delta)
    assert chosen == pytest.approx(composed, rel=3e-3)


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
def test_mixture_bounds_enclose_the_composed_delta(sigma):
    rate, count, delta = 0.01, 2000, 1e-7
    epsilon = get_epsilon(noise_multiplier=sigma, sample_rate=rate, steps=count, delta=delta)
    mixture = ParticipationMixture(rate, count, math.log(delta))
    assert mixture.lower(epsilon, sigma) <= math.log(delta) + 1e-6
    assert mixture.upper(epsilon / 1.002, sigma) >= math.log(delta)


def test_full_rate_is_the_limit_of_high_rates():
    run = {"noise_multiplier": 4.0, "steps": 50, "delta": 1e-6}
    nearly = get_epsilon(sample_rate=1 - 1e-9, **run)
    assert nearly == pytest.approx(get_epsilon(sample_rate=1.0, **run), rel=1e-3)


@few
@given(sigma=sigmas, rate=rates, first=steps, second=steps)
def test_history_does_not_depend_on_how_it_is_cut(sigma, rate, first, second):
    whole = get_epsilon(noise_multiplier=sigma, sample_rate=rate, steps=first + second, delta=1e-6)
    cut = get_history_epsilon(
        [(sigma, rate, first), (2 * sigma, 0.0, 7), (sigma, rate, second)], delta=1e-6
    )
    assert cut == whole


@pytest.mark.parametrize("sigma", [0.001, 0.05, 1.0])
def test_almost_equal_phases_cost_what_equal_ones_do(sigma):
    phases = [(sigma * (1 + 1e-7 * i), 0.01, 100) for i in range(10)]
    whole = get_epsilon(noise_multiplier=sigma, sample_rate=0.01, steps=1000, delta=1e-6)
    assert get_history_epsilon(phases, delta=1e-6) == pytest.approx(whole, rel=5e-3)


def test_changing_noise_lies_between_its_extremes_and_scales_to_many_phases():
    ramp = [(1 + i / 500, 0.01, 2) for i in range(500)]
    mixed = get_history_epsilon(ramp, delta=1e-6)
    low, high = (
        get_epsilon(noise_multiplier=sigma, sample_rate=0.01, steps=1000, delta=1e-6)
        for sigma in (2.0, 1.0)
    )
    assert low < mixed < high
    fine = get_history_epsilon([(1 + i / 16, 0.01, 63) for i in range(16)], delta=1e-6)
    assert mixed == pytest.approx(fine, rel=0.05)


def test_tiny_noise_beside_ordinary_noise():
    alone = get_epsilon(noise_multiplier=5e-6, sample_rate=0.01, steps=1000, delta=1e-6)
    both = get_history_epsilon([(5e-6, 0.01, 1000), (1.0, 0.01, 1000)], delta=1e-6)
    assert alone * 0.999 <= both <= alone * 1.005


def test_random_sweep_answers_everywhere():
    generator = np.random.default_rng(20261122)
    for _ in range(40):
        epsilon, rate, count, delta = np.exp(
            generator.uniform(np.log([1e-2, 1e-5, 1, 1e-12]), np.log([1e15, 1, 1e6, 1e-3]))
        )
        run = {"sample_rate": float(rate), "steps": int(count)}
        if math.log(delta) >= log_saturation((Phase(1.0, **run),)):
            continue
        sigma = get_noise_multiplier(target_epsilon=epsilon, target_delta=delta, **run)
        spent = get_epsilon(noise_multiplier=sigma, delta=delta, **run)
        assert 0.99 * epsilon <= spent <= epsilon


def test_no_budget_is_spent_without_data_or_where_delta_covers_participation():
    assert get_history_epsilon([], delta=1e-6) == 0.0
    assert get_epsilon(noise_multiplier=1.0, sample_rate=0.0, steps=5, delta=1e-6) == 0.0
    assert get_epsilon(noise_multiplier=1e-3, sample_rate=1e-5, steps=5, delta=1e-4) == 0.0


BAD = {
    "noise_multiplier": (0.0, -1.0, 1e-300, 1e300, math.nan, math.inf, "1", None),
    "sample_rate": (-0.1, 1.1, math.nan),
    "steps": (0, -3, 2.5, math.nan, True),
    "delta": (0.0, 1.0, math.nan, -1e-6),
    "accountant": ("moments",),
}
GOOD = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-6}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_bad_input_is_named_with_its_value(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*expected") as caught:
        get_epsilon(**{**GOOD, name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_epsilon", 0.001),
        ("target_epsilon", 1e16),
        ("target_epsilon", math.nan),
        ("target_delta", 0.0),
        ("target_delta", 1.0),
        ("sample_rate", 0.0),
        ("steps", 1.5),
    ],
)
def test_bad_targets_are_named_with_their_value(name, value):
    good = {"target_epsilon": 1.0, "target_delta": 1e-6, "sample_rate": 0.1, "steps": 10}
    with pytest.raises(ValueError, match=f"{name}=.*expected") as caught:
        get_noise_multiplier(**{**good, name: value})
    assert repr(value) in str(caught.value)
