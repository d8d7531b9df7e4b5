"""The privacy report: its numbers, and what it says of them in words."""

import json
import math

import numpy as np
import pytest
from scipy.stats import norm

from dpkernels.accounting import Accountant, get_epsilon
from dpkernels.accounting.accountants import ACCOUNTANTS
from dpkernels.training.privacy import PrivacyPlan
from dpkernels.training.report import PrivacyReport, _membership_success, build_report
from tests.training.toy import ToyConfig, tiny


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (4.0, 16), (0.2, 3)])
def test_the_bound_on_guessing_participation_is_the_gaussian_one_without_subsampling(sigma, steps):
    """Two Gaussians at distance mu = sqrt(T) / sigma: the best guess is right Phi(mu / 2)."""
    plan = PrivacyPlan(True, 10, 1.0, steps, sigma, 1.0, 1, 1e-5, "tight")
    exact = float(norm.cdf(np.sqrt(steps) / sigma / 2))
    found = _membership_success(plan, steps)
    assert exact <= found <= exact + 2e-3


def test_nothing_is_claimed_about_participation_when_the_noise_is_tiny():
    plan = PrivacyPlan(True, 10, 1.0, 5, 1e-4, 1.0, 1, 1e-5, "tight")
    assert _membership_success(plan, 5) == 1.0


@pytest.mark.parametrize(
    ("sigma", "words"),
    [(20.0, "a strong guarantee"), (0.6, "a weak guarantee"), (1e-4, "next to no guarantee")],
)
def test_the_report_says_what_its_budget_is_worth(sigma, words):
    plan = PrivacyPlan(True, 10, 1.0, 5, sigma, 1.0, 1, 1e-5, "tight")
    columns = {"clipped_fraction": []}
    report = build_report(tiny(), plan, 5, columns, (), (), 512)
    assert words in report.to_markdown()


def report(config: ToyConfig | None = None, **changes: object) -> PrivacyReport:
    values = {
        "enabled": True, "patients": 40, "sample_rate": 0.1, "steps": 30, "noise_multiplier": 1.0,
        "max_grad_norm": 0.5, "views_per_patient": 2, "delta": 1e-5, "accountant": "tight",
    }  # fmt: skip
    plan = PrivacyPlan(**{**values, **changes})
    columns = {"clipped_fraction": [0.25, math.nan, 0.75]}
    return build_report(config or tiny(), plan, 20, columns, ["A picture."], ["A note."], 512)


def test_the_budget_is_that_of_the_steps_taken():
    made = report()
    run = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 20, "delta": 1e-5}
    assert made.epsilon == get_epsilon(**run)
    assert made.epsilon_rdp == get_epsilon(**run, accountant="rdp") > made.epsilon
    assert made.clipped_fraction == 0.5
    text = made.to_markdown()
    for words in (
        f"({made.epsilon:.4g}, 1e-05)-differentially private",
        "| Steps T | 20 of 30 planned |",
        "| Share of patients clipped, mean | 50.0% |",
        "## Reconstruction risk",
        "- A picture.",
        "- A note.",
    ):
        assert words in text, words


def test_everything_is_plain_values_for_json():
    stated = json.loads(json.dumps(report().to_dict(), allow_nan=False))
    assert stated["adjacency"] == "add or remove one patient with everything recorded of it"
    assert (stated["steps"], stated["planned_steps"], stated["expected_batch_size"]) == (20, 30, 4)
    assert stated["noise"] == "operating-system entropy"
    assert stated["risk"]["delta"] == 1e-5


def test_the_unit_is_named_throughout():
    text = report(unit="lesion").to_markdown()
    assert "The unit is the lesion" in text
    assert "40 training lesions" in text
    assert "patient" not in text.replace("another picture of the same person", "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"insecure_fixed_noise": 7}, "no privacy guarantee: noise and sampling came from the"),
        ({"enabled": False, "noise_multiplier": 0.0}, "no privacy guarantee.** It was trained"),
    ],
)
def test_a_run_without_a_guarantee_claims_none(changes, words):
    made = report(**changes)
    assert words in made.to_markdown()
    assert "differentially private" not in made.to_markdown()
    assert (made.membership, made.risk) == (None, None)


def test_what_an_accountant_cannot_state_is_not_available(monkeypatch):
    def refuse(history, delta):
        raise ValueError("accountant='rdp': no bound")

    monkeypatch.setitem(ACCOUNTANTS, "rdp", Accountant("rdp", "", refuse))
    made = report()
    assert made.epsilon_rdp is None
    assert "| Epsilon (Opacus RDP accountant) | not available |" in made.to_markdown()


def test_weights_that_training_began_with_add_their_budget():
    config = tiny({"training": {"init_from": "former.pt"}})
    assert "Training started from former.pt" in report(config).to_markdown()
    assert "Training started from" not in report().to_markdown()
