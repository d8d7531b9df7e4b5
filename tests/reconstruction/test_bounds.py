"""Reconstruction bounds. Exact values: independently computed; see docs/math.md."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkernels.accounting import get_delta
from dpkernels.reconstruction import (
    likelihood_ratio_bound,
    mse_probability,
    mse_quantile,
    ncc_bound,
    ncc_quantile,
    profile_bound,
    psnr_probability,
    psnr_quantile,
    pure_dp_bound,
    rdp_bound,
    rero_bound,
    simulate_rero,
)

SUBSAMPLED = [
    (0.1, 1, 0.1, 100, 0.46918613, 0.28646655),
    (0.1, 2, 0.1, 100, 0.22758983, 0.13649378),
    (0.01, 1, 0.01, 1000, 0.02913909, 0.01883114),
    (0.001, 0.8, 0.01, 1000, 0.00784589, 0.00400940),
    (0.1, 0.5, 0.05, 100, 0.68777445, 0.57224667),
    (0.001, 1.5, 0.02, 2000, 0.00797238, 0.00258499),
    (1 / 106, 9.97397, 1 / 106, 53000, 0.0165966, 0.00983408),
    (1 / 106, 1.66405, 1 / 106, 53000, 0.179577, 0.0368346),
    (1 / 106, 0.958156, 1 / 106, 53000, 0.742430, 0.273710),
    (1 / 106, 0.782516, 1 / 106, 53000, 0.968149, 0.647998),
    (1 / 106, 0.310591, 1 / 106, 53000, 1, 1),
    (1 / 106, 5.39907e-6, 1 / 106, 53000, 1, 1),
]


@pytest.mark.parametrize(("kappa", "sigma", "rate", "steps", "worst", "relaxed"), SUBSAMPLED)
def test_subsampled_bounds(kappa, sigma, rate, steps, worst, relaxed):
    run = {"noise_multiplier": sigma, "sample_rate": rate, "steps": steps, "kappa": kappa}
    for adversary, exact in (("worst_case", worst), ("relaxed", relaxed)):
        found = rero_bound(**run, adversary=adversary)
        assert exact <= found <= exact * (1 + 1e-4)


@pytest.mark.parametrize(
    ("kappa", "sigma", "exact"),
    [
        (1 / 13, 1, 0.3350259161),
        (1 / 13, 2, 0.1772030161),
        (0.1, 1, 0.3891436916),
        (0.01, 0.5, 0.3720805854),
    ],
)
def test_full_batch_worst_case(kappa, sigma, exact):
    found = rero_bound(noise_multiplier=sigma, sample_rate=1.0, steps=1, kappa=kappa)
    assert found == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize(
    ("kappa", "dimension", "exact"),
    [
        (1 / 13, 1, 0.2238115332),
        (1 / 13, 10, 0.1191453532),
        (1 / 13, 1000, 0.0802695801),
        (0.1, 1, 0.2635973359),
    ],
)
def test_full_batch_likelihood_ratio(kappa, dimension, exact):
    run = {"noise_multiplier": 1.0, "kappa": kappa}
    found = likelihood_ratio_bound(**run, dimension=dimension)
    assert found == pytest.approx(exact, rel=1e-8)
    assert found == rero_bound(
        **run, sample_rate=1.0, steps=1, adversary="relaxed", dimension=dimension
    )


def test_composition_agrees_with_the_closed_form_of_one_relaxed_step():
    run = {"noise_multiplier": 1.0, "steps": 1, "kappa": 0.1, "adversary": "relaxed"}
    nearly = rero_bound(sample_rate=1 - 1e-9, **run)
    assert nearly == pytest.approx(0.2635973359, rel=1e-4)


runs = {
    "sigma": st.floats(math.log(1e-6), math.log(30)).map(math.exp),
    "rate": st.floats(math.log(1e-5), 0.0).map(lambda x: min(1.0, math.exp(x))),
    "steps": st.floats(0.0, math.log(1e4)).map(lambda x: int(math.exp(x))),
    "kappa": st.floats(math.log(1e-9), math.log(0.9)).map(math.exp),
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**runs)
def test_bounds_lie_between_chance_and_saturation_and_in_order(sigma, rate, steps, kappa):
    run = {"noise_multiplier": sigma, "sample_rate": rate, "steps": steps, "kappa": kappa}
    cap = 1 - (1 - rate) ** steps * (1 - kappa)
    worst, relaxed = (rero_bound(**run, adversary=name) for name in ("worst_case", "relaxed"))
    assert kappa <= relaxed <= worst * (1 + 1e-4)
    assert worst <= cap * (1 + 1e-9)
    louder = rero_bound(**{**run, "noise_multiplier": 1.2 * sigma})
    assert louder <= worst * (1 + 1e-4)
    longer = rero_bound(**{**run, "steps": 2 * steps})
    assert longer >= worst * (1 - 1e-4)


@pytest.mark.parametrize("kappa", [0.1, 1e-3])
def test_worst_case_is_the_best_line_under_the_profile(kappa):
    run = {"noise_multiplier": 1.0, "sample_rate": 0.05, "steps": 100}
    epsilons = [0.05 * i for i in range(1, 80)]
    deltas = [get_delta(**run, epsilon=epsilon) for epsilon in epsilons]
    assert profile_bound(kappa=kappa, epsilons=epsilons, deltas=deltas) == pytest.approx(
        rero_bound(**run, kappa=kappa), rel=2e-3
    )


def test_conversions_of_a_gaussian_lie_above_its_bound():
    exact = rero_bound(noise_multiplier=1.0, sample_rate=1.0, steps=1, kappa=0.01)
    for order in (1.5, 2, 4, 8):
        assert rdp_bound(kappa=0.01, order=order, rdp=order / 2) > exact
    assert pure_dp_bound(kappa=0.1, epsilon=math.log(3)) == pytest.approx(0.3)
    assert pure_dp_bound(kappa=0.1, epsilon=1e15) == 1.0
    assert rdp_bound(kappa=0.25, order=2, rdp=0.0) == pytest.approx(0.5)


@pytest.mark.parametrize("adversary", ["worst_case", "relaxed"])
@pytest.mark.parametrize(
    ("kappa", "sigma", "rate", "steps"),
    [
        (0.1, 1, 0.1, 100),
        (0.1, 1, 1.0, 10),
        (0.1, 1, 1.0, 100),
        (0.001, 0.8, 0.01, 300),
        (1e-9, 0.3, 0.01, 50),
    ],
)
def test_simulation_agrees(adversary, kappa, sigma, rate, steps):
    run = {"noise_multiplier": sigma, "sample_rate": rate, "steps": steps, "kappa": kappa}
    bound = rero_bound(**run, adversary=adversary)
    simulation = simulate_rero(**run, adversary=adversary, samples=12_000, seed=3)
    assert simulation.effective_samples > 100
    assert simulation.low <= bound * (1 + 1e-9)
    assert bound <= simulation.high * (1 + 1e-4)
    assert simulation.high - simulation.low < 0.15 * bound


FROM_SCRATCH = [
    (0.01, 1, 0.0796556746),
    (0.1, 1, 0.2481703660),
    (1, 1, 0.6826894921),
    (1, 3072, 0.5033930853),
    (0.9, 3072, 2.56703e-5),
    (1.05, 3072, 0.9735859242),
]


@pytest.mark.parametrize(("mse", "dimension", "exact"), FROM_SCRATCH)
def test_from_scratch_errors(mse, dimension, exact):
    known = {"noise_multiplier": 1.0, "dimension": dimension, "data_norm": 1.0}
    assert mse_probability(mse, **known) == pytest.approx(exact, rel=2e-7)
    assert mse_quantile(exact, **known) == pytest.approx(mse, rel=1e-7)
    psnr = 20 * math.log10(2.0) - 10 * math.log10(mse)
    assert psnr_probability(psnr, **known, data_range=2.0) == pytest.approx(exact, rel=2e-7)
    assert psnr_quantile(exact, **known, data_range=2.0) == pytest.approx(psnr, rel=1e-6)


@pytest.mark.parametrize(
    ("sigma", "exact"), [(0.0895811, 0.0123326), (0.00539175, 0.2007444), (1.70733e-4, 0.9882699)]
)
def test_correlation(sigma, exact):
    found = ncc_bound(noise_multiplier=sigma, dimension=819200)
    assert found == pytest.approx(exact, rel=5e-6)


@pytest.mark.parametrize(("dimension", "sigma"), [(3, 0.5), (40, 0.3), (40, 3.0), (500, 1e-3)])
def test_correlations_exceed_their_quantile_no_more_often_than_stated(dimension, sigma):
    """Records with and without a mean; and the bound is not idle: above it lies at least a tenth
    of what is stated."""
    rng = np.random.default_rng(5)
    bound = ncc_quantile(0.2, noise_multiplier=sigma, dimension=dimension, observations=1)
    for mean in (0.0, 2.0):
        record = rng.standard_normal(dimension) + mean
        record -= record.mean() - mean
        noise = sigma * np.linalg.norm(record) * rng.standard_normal((20_000, dimension))
        seen = record + noise
        seen -= seen.mean(axis=1, keepdims=True)
        centred = record - record.mean()
        reached = seen @ centred / np.linalg.norm(seen, axis=1) / np.linalg.norm(centred)
        share = float((reached > bound).mean())
        assert share <= 0.2
        assert share >= 0.02 or mean


def test_correlation_quantiles_at_the_edges():
    assert ncc_quantile(0.05, noise_multiplier=1.0, dimension=2) == 1.0
    assert ncc_quantile(0.05, noise_multiplier=1e-12, dimension=100) == pytest.approx(1.0)
    large = {"noise_multiplier": 0.01, "dimension": 10**7}
    assert ncc_quantile(0.05, **large) == pytest.approx(ncc_bound(**large), rel=0.05)
    assert ncc_quantile(0.05, **large) > ncc_bound(**large)
    with pytest.raises(ValueError, match="probability=1.5"):
        ncc_quantile(1.5, noise_multiplier=1.0, dimension=10)


def test_observations_average_the_noise():
    known = {"dimension": 50, "data_norm": 3.0}
    assert mse_quantile(0.3, noise_multiplier=2.0, observations=16, **known) == pytest.approx(
        mse_quantile(0.3, noise_multiplier=0.5, **known)
    )
    assert ncc_bound(noise_multiplier=2.0, dimension=50, observations=16) == pytest.approx(
        ncc_bound(noise_multiplier=0.5, dimension=50)
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"kappa": 0.0}, "kappa=0.0"),
        ({"kappa": 1.0}, "kappa=1.0"),
        ({"kappa": math.nan}, "kappa=nan"),
        ({"noise_multiplier": 0.0}, "noise_multiplier=0.0"),
        ({"noise_multiplier": None}, "noise_multiplier=None"),
        ({"sample_rate": 2.0}, "sample_rate=2.0"),
        ({"steps": 0.5}, "steps=0.5"),
        ({"adversary": "lucky"}, "adversary='lucky'"),
        ({"dimension": 0}, "dimension=0"),
        ({"dimension": 3}, "dimension=3"),
        ({"dimension": 3, "adversary": "relaxed"}, "dimension=3"),
        ({"history": [(1.0, 0.1, 5)]}, "noise_multiplier=1.0"),
    ],
)
def test_bad_input_is_named(change, name):
    good = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "kappa": 0.1}
    with pytest.raises(ValueError, match=name):
        rero_bound(**{**good, **change})
