"""Agreement with dp-accounting where it is sound, and with Opacus' own accountants."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from dp_accounting.pld import privacy_loss_distribution
from opacus.accountants import RDPAccountant, create_accountant

from dpkernels.accounting import (
    get_epsilon,
    get_history_epsilon,
    get_noise_multiplier,
    opacus_accountants,
)
from dpkernels.accounting.opacus_adapter import HistoryAccountant, register


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta"),
    [
        (1.0, 0.01, 1000, 1e-5),
        (0.6, 0.02, 300, 1e-6),
        (3.0, 0.1, 2000, 1e-8),
        (0.4, 0.001, 500, 1e-5),
        (5.0, 1.0, 40, 1e-5),
    ],
)
def test_google_pld_encloses_us(sigma, rate, steps, delta):
    ours = get_epsilon(noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta)
    pld = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=2e-5 * ours
    )
    theirs = pld.self_compose(steps).get_epsilon_for_delta(delta)
    assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.filterwarnings("ignore:GDP accounting", "ignore:Optimal order")
@pytest.mark.parametrize(
    ("mechanism", "history"),
    [
        ("rdp", [(1.0, 0.01, 1000)]),
        ("rdp", [(0.01, 0.1, 50)]),
        ("rdp", [(1.0, 0.01, 1000), (0.8, 0.02, 300), (1.0, 0.01, 5)]),
        ("prv", [(1.0, 0.01, 1000)]),
        ("prv", [(1.0, 0.01, 100), (0.9, 0.02, 30)]),
        ("gdp", [(1.0, 0.01, 1000)]),
    ],
)
def test_they_are_opacus_bit_for_bit(mechanism, history):
    """Without torch they are loaded from Opacus' files around its package."""
    theirs, ours = create_accountant(mechanism), opacus_accountants.accountant(mechanism)
    theirs.history, ours.history = list(history), list(history)
    spent = theirs.get_epsilon(1e-6)
    assert ours.get_epsilon(1e-6) == spent
    # Phases are merged and ordered, which moves the last digits of a sum.
    found = get_history_epsilon(history, delta=1e-6, accountant=mechanism)
    assert found == (spent if len(history) == 1 else pytest.approx(spent, rel=1e-12))


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
def test_calibration_under_opacus_accountants_keeps_their_budget(accountant):
    target = 2.0 if accountant != "gdp" else 1.0
    run = {"sample_rate": 0.02, "steps": 200, "accountant": accountant}
    sigma = get_noise_multiplier(target_epsilon=target, target_delta=1e-5, **run)
    spent = get_epsilon(noise_multiplier=sigma, delta=1e-5, **run)
    assert 0.999 * target <= spent <= target


def test_what_opacus_cannot_do_is_refused_by_name():
    run = {"target_delta": 8e-7, "sample_rate": 0.01, "steps": 5000}
    with pytest.raises(ValueError, match="accountant='prv'"):
        get_noise_multiplier(target_epsilon=1e4, accountant="prv", **run)
    with pytest.raises(ValueError, match="accountant='rdp'"):
        get_noise_multiplier(target_epsilon=0.01, accountant="rdp", **run)
    with pytest.raises(ValueError, match="accountant='gdp'"):
        get_history_epsilon([(1.0, 0.1, 5), (2.0, 0.1, 5)], delta=1e-5, accountant="gdp")


def _steps(accountant, *phases):
    for sigma, rate, count in phases:
        for _ in range(count):
            accountant.step(noise_multiplier=sigma, sample_rate=rate)
    return accountant


def test_tight_is_registered_and_counts_as_rdp_does():
    register()
    register()
    accountant = _steps(create_accountant("tight"), (1.0, 0.1, 3), (2.0, 0.1, 2), (1.0, 0.1, 1))
    other = _steps(RDPAccountant(), (1.0, 0.1, 3), (2.0, 0.1, 2), (1.0, 0.1, 1))
    assert isinstance(accountant, HistoryAccountant)
    assert accountant.history == other.history
    assert len(accountant) == len(other) == 3
    assert accountant.mechanism() == "tight"
    expected = get_history_epsilon(accountant.history, delta=1e-5)
    assert accountant.get_epsilon(delta=1e-5) == expected > 0


def test_accountant_state_survives_checkpoints():
    accountant = _steps(HistoryAccountant(), (1.0, 0.1, 3))
    restored = HistoryAccountant()
    restored.load_state_dict(pickle.loads(pickle.dumps(accountant.state_dict())))
    assert restored.history == accountant.history
    other = _steps(RDPAccountant(), (1.0, 0.1, 5))
    restored.load_state_dict(other.state_dict())
    assert restored.history == other.history
    with pytest.raises(ValueError, match="state_dict of other .*tight"):
        restored.load_state_dict({"history": [], "mechanism": "other"})


def test_accountant_edges():
    accountant = HistoryAccountant()
    assert accountant.get_epsilon(delta=1e-5) == 0
    accountant.step(noise_multiplier=0.0, sample_rate=0.1)
    assert accountant.get_epsilon(delta=1e-5) == float("inf")
    with pytest.raises(ValueError, match=r"delta=0\.0"):
        accountant.get_epsilon(delta=0.0)


def test_accounting_and_bounds_import_no_torch():
    code = (
        "import sys, dpkernels.accounting, dpkernels.reconstruction;"
        "dpkernels.accounting.get_epsilon(noise_multiplier=1, sample_rate=.1, steps=9, delta=1e-5);"
        "assert not {'torch', 'opacus', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_failures_inside_opacus_name_the_accountant():
    with pytest.raises(ValueError, match=r"accountant='gdp'.*Use accountant='tight'"):
        get_epsilon(
            noise_multiplier=0.35, sample_rate=0.01, steps=5000, delta=8e-7, accountant="gdp"
        )
