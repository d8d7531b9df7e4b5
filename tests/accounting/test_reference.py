"""Exact values: independently computed; see docs/math.md."""

from __future__ import annotations

import pytest

from dpkernels.accounting import get_epsilon, get_noise_multiplier

DELTA = 8e-7
RUNS = {"subsampled": (0.01, 5000), "full batch": (1.0, 100), "volumes": (0.009434, 53000)}
NOISE = {
    0.01: (220.65763, 3120.1847, 677.68115),
    1: (3.1274566, 42.702844, 9.3099456),
    8: (0.79146703, 6.5784382, 1.5904627),
    20: (0.57787537, 3.108617, 0.93165165),
    32: (0.50237037, 2.172372, 0.76567566),
    100: (0.36423262, 0.98131976, 0.53932655),
    1e4: (0.064734277, 0.073146812, 0.15214914),
    1e6: (0.0065965903, 0.0070950966, 0.017440826),
    1e9: (0.00020856911, 0.00022363079, 0.00055227895),
    1e12: (6.5954556e-06, 7.0710918e-06, 1.7464261e-05),
    1e15: (2.0856654e-07, 2.2360682e-07, 5.5226806e-07),
}
CASES = [
    (epsilon, *run, sigma)
    for epsilon, sigmas in NOISE.items()
    for run, sigma in zip(RUNS.values(), sigmas, strict=True)
]


@pytest.mark.parametrize(("epsilon", "rate", "steps", "sigma"), CASES)
def test_noise_multiplier_is_never_below_exact_nor_half_a_percent_above(
    epsilon, rate, steps, sigma
):
    found = get_noise_multiplier(
        target_epsilon=epsilon, target_delta=DELTA, sample_rate=rate, steps=steps
    )
    assert sigma <= found <= 1.005 * sigma


@pytest.mark.parametrize(("epsilon", "rate", "steps", "sigma"), CASES)
def test_epsilon_is_never_below_exact_nor_one_percent_above(epsilon, rate, steps, sigma):
    found = get_epsilon(noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=DELTA)
    assert epsilon <= found <= 1.01 * epsilon


# nominal epsilon of the literature: noise under Opacus' RDP accountant, tight epsilon of that noise
NOMINAL = {
    1: (9.97397, 0.92812),
    8: (1.66405, 7.50472),
    20: (0.958156, 18.8508),
    32: (0.782516, 30.2094),
    1e3: (0.310591, 952.13),
    1e6: (0.0895811, 3.48144e4),
    1e9: (0.00539175, 1.04926e7),
    1e12: (1.70733e-4, 1.04633e10),
    1e15: (5.39907e-6, 1.04631e13),
}


@pytest.mark.parametrize(("nominal", "sigma", "exact"), [(k, *v) for k, v in NOMINAL.items()])
def test_nominal_budgets_of_the_literature(nominal, sigma, exact):
    found = get_noise_multiplier(
        target_epsilon=nominal,
        target_delta=DELTA,
        sample_rate=1 / 106,
        steps=53000,
        accountant="rdp",
    )
    assert found == pytest.approx(sigma, rel=3e-6)
    tight = get_epsilon(noise_multiplier=sigma, sample_rate=1 / 106, steps=53000, delta=DELTA)
    assert exact <= tight <= 1.01 * exact
