"""Rows, table and conclusion of a study, from made-up cells."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace

import pytest

from dpkernels.reconstruction import ncc_bound, ncc_quantile
from dpkernels.study import results
from dpkernels.study.results import Reached, Risk, Row
from dpkernels.study.verdict import conclude
from dpkernels.training.privacy import PrivacyPlan

TITLES = {"imprint": "imprint", "optimal": "optimal, one update"}


def row(epsilon: float, utility: float, imprint: float, optimal: float) -> Row:
    return Row(
        epsilon=epsilon,
        noise_multiplier=0.0 if math.isinf(epsilon) else 1 / epsilon,
        epsilon_tight=epsilon,
        utility=utility,
        spread=None,
        seeds=1,
        risk=Risk(0.9, 0.8, 0.5, 0.6),
        attacks={
            "imprint": Reached(imprint, 0.1, 10.0, imprint, 0.02),
            "optimal": Reached(optimal, 0.1, 10.0, optimal, 0.02),
        },
        prior_ncc=0.9,
    )


PAPER = [
    row(1, 0.0, 0.01, 0.02),
    row(8, 0.5, 0.01, 0.02),
    row(1e6, 0.88, 0.03, 0.3),
    row(1e9, 0.9, 0.5, 0.99),
    row(1e15, 0.9, 1.0, 1.0),
    row(math.inf, 0.9, 1.0, 1.0),
]


def text(rows: list[Row]) -> str:
    return "\n".join(conclude(rows, "Dice", TITLES, "patient").sentences)


def test_the_published_shape_is_recognised() -> None:
    found = conclude(PAPER, "Dice", TITLES, "patient")
    assert (found.kept_from, found.hidden_to) == (1e6, {"imprint": 1e6, "optimal": 8})
    assert found.window("imprint") == (1e6, 1e6)
    assert found.window("optimal") is None
    words = text(PAPER)
    assert "Conclusion (imprint): these data bear the claim" in words
    assert "Conclusion (optimal, one update): these data do not bear the claim" in words
    assert "at epsilon 1e6, the attack's median correlation is 0.300" in words
    assert "epsilon 1 Dice is 0.000" in words
    assert "From epsilon 1e15 it is above 0.9" in words


def test_other_data_give_other_words() -> None:
    visible = [
        replace(r, attacks={n: Reached(0.8, 0, 0, 0.8, 0.02) for n in TITLES}) for r in PAPER
    ]
    assert "bear the claim that" not in text(visible)
    assert "no budget of the study holds it at chance" in text(visible)
    useless = [replace(r, utility=0.1 if math.isfinite(r.epsilon) else 0.9) for r in PAPER]
    assert "No budget of the study keeps 95%" in text(useless)
    assert "bear no claim" in text(useless)
    assert "no non-private run was part of the study" in text(PAPER[:-1])


def test_a_budget_counts_only_if_all_larger_ones_keep_the_utility() -> None:
    dented = [replace(r, utility=0.5) if r.epsilon == 1e9 else r for r in PAPER]
    found = conclude(dented, "Dice", TITLES, "patient")
    assert found.kept_from == 1e15
    assert found.window("imprint") is None


def cell(epsilon: float | None, utility: float, ncc: list[float]) -> dict:
    patients = [{"ncc": value, "ssim": value / 2, "psnr": None, "mse": 0.1} for value in ncc]
    return {
        "epsilon": epsilon,
        "utility": utility,
        "noise_multiplier": 0.5,
        "epsilon_tight": epsilon,
        "risk": {"worst_case": 0.5, "relaxed": 0.4, "ncc_update": 0.3, "ncc_run": 0.35},
        "prior_ncc": None,
        "attacks": {"imprint": {"chance_ncc": 0.02, "patients": patients}},
    }


def test_rows_gather_seeds_and_patients() -> None:
    cells = [cell(None, 0.9, [1.0]), cell(8.0, 0.4, [0.1, 0.2]), cell(8.0, 0.6, [0.3, 0.9])]
    first, last = results.rows_of(cells)
    assert (first.epsilon, first.seeds, last.epsilon) == (8.0, 2, math.inf)
    assert first.utility == pytest.approx(0.5)
    assert first.spread == pytest.approx(math.sqrt(0.02))
    assert last.spread is None
    assert first.attacks["imprint"].ncc == pytest.approx(0.25)
    assert first.attacks["imprint"].best_ncc == 0.9
    assert first.attacks["imprint"].psnr == math.inf


def test_every_format_says_the_same() -> None:
    head, body = results.table(PAPER, "Dice", TITLES)
    assert all(len(line) == len(head) for line in body)
    assert list(csv.reader(io.StringIO(results.to_csv(head, body)))) == [head, *body]
    markdown = results.to_markdown(head, body).splitlines()
    assert [part.strip() for part in markdown[4].strip("|").split("|")] == body[2]
    assert body[2][0] == "1e6"
    assert body[2][head.index("NCC imprint")] == "0.030"


@pytest.mark.parametrize(
    ("epsilon", "expected"),
    [(1, "1"), (8, "8"), (0.5, "0.5"), (100, "100"), (1e3, "1e3"), (1e15, "1e15"),
     (1234, "1234"), (math.inf, "non-private")],
)  # fmt: skip
def test_budgets_as_people_write_them(epsilon: float, expected: str) -> None:
    assert results.budget(epsilon) == expected


def plan(sigma: float) -> PrivacyPlan:
    return PrivacyPlan(sigma > 0, 96, 1 / 48, 600, sigma, 0.5, 1, 1e-5, "tight")


def test_risk_without_noise_is_what_little_noise_tends_to() -> None:
    little, none = results.risk_of(plan(1e-9), 4096, 12), results.risk_of(plan(0.0), 4096, 12)
    assert none.worst_case == pytest.approx(little.worst_case, rel=1e-6)
    assert none.relaxed == pytest.approx(little.relaxed, rel=1e-6)
    assert (none.ncc_update, none.ncc_run) == (1.0, 1.0)
    much = results.risk_of(plan(0.5), 4096, 12)
    typical = ncc_bound(noise_multiplier=0.5, dimension=4096)
    assert typical < much.ncc_update < much.ncc_run < 0.2
    exceeded = ncc_quantile(0.05, noise_multiplier=0.5, dimension=4096)
    assert much.ncc_update == pytest.approx(exceeded, rel=1e-12)
    assert 1 / 96 < much.relaxed < much.worst_case < 1
