"""The numbers of a study: one cell for each budget and seed, one row for each budget."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from dpkernels.reconstruction import ncc_quantile, rero_bound
from dpkernels.training.privacy import PrivacyPlan

#: probability at which a reconstruction may exceed the correlations of :class:`Risk`
UNLIKELY = 0.05


@dataclass(frozen=True)
class Risk:
    """Bounds at a noise level, for the whole run unless said otherwise.

    Attributes:
        worst_case: success at picking one of N candidates, attacker who knows the gradients.
        relaxed: the same, attacker who knows their size only.
        ncc_update: correlation that a reconstruction from scratch, from one update, exceeds with
            probability :data:`UNLIKELY` at most.
        ncc_run: the same from q * T averaged updates.
    """

    worst_case: float
    relaxed: float
    ncc_update: float
    ncc_run: float


def risk_of(plan: PrivacyPlan, dimension: int, observations: int) -> Risk:
    """Bounds for a run; without noise what they tend to.

    Args:
        plan: its privacy.
        dimension: values in one record.
        observations: updates that contain a record in a typical run.
    """
    kappa = 1 / plan.patients
    if plan.noise_multiplier == 0:
        q = plan.sample_rate
        unseen = math.exp(plan.steps * math.log1p(-q)) if q < 1 else 0.0
        success = 1 - unseen * (1 - kappa)
        return Risk(success, success, 1.0, 1.0)
    worst_case, relaxed = (
        rero_bound(
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            steps=plan.steps,
            kappa=kappa,
            adversary=adversary,
        )
        for adversary in ("worst_case", "relaxed")
    )
    update, run = (
        ncc_quantile(
            UNLIKELY,
            noise_multiplier=plan.noise_multiplier,
            dimension=dimension,
            observations=count,
        )
        for count in (1, observations)
    )
    return Risk(worst_case, relaxed, update, run)


@dataclass(frozen=True)
class Reached:
    """What one adversary reached at one budget, over all seeds and patients.

    Attributes:
        ncc, ssim, psnr: medians.
        best_ncc: of the best reconstruction.
        chance_ncc: of candidates of pure noise.
    """

    ncc: float
    ssim: float
    psnr: float
    best_ncc: float
    chance_ncc: float


@dataclass(frozen=True)
class Row:
    """One budget.

    Attributes:
        epsilon: nominal; infinite without privacy.
        noise_multiplier: std of the noise over the clipping bound.
        epsilon_tight: what the noise guarantees; infinite without privacy.
        utility: mean over the seeds.
        spread: standard deviation over the seeds; None for a single seed.
        seeds: number of seeds.
        risk: bounds.
        attacks: by adversary.
        prior_ncc: of a guess without any model; None if unknown.
    """

    epsilon: float
    noise_multiplier: float
    epsilon_tight: float
    utility: float
    spread: float | None
    seeds: int
    risk: Risk
    attacks: dict[str, Reached]
    prior_ncc: float | None


def rows_of(cells: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows by rising budget.

    Args:
        cells: as the runner stores them, any order.
    """
    budgets = sorted({_number(cell["epsilon"]) for cell in cells})
    return [_row(e, [c for c in cells if _number(c["epsilon"]) == e]) for e in budgets]


def _row(epsilon: float, cells: list[dict[str, Any]]) -> Row:
    utilities = [cell["utility"] for cell in cells]
    priors = [cell["prior_ncc"] for cell in cells if cell["prior_ncc"] is not None]
    first = cells[0]
    return Row(
        epsilon=epsilon,
        noise_multiplier=first["noise_multiplier"],
        epsilon_tight=_number(first["epsilon_tight"]),
        utility=fmean(utilities),
        spread=stdev(utilities) if len(utilities) > 1 else None,
        seeds=len(cells),
        risk=Risk(**first["risk"]),
        attacks={
            name: _reached([cell["attacks"][name] for cell in cells]) for name in first["attacks"]
        },
        prior_ncc=fmean(priors) if priors else None,
    )


def _reached(attacks: list[dict[str, Any]]) -> Reached:
    patients = [patient for attack in attacks for patient in attack["patients"]]
    return Reached(
        ncc=median(p["ncc"] for p in patients),
        ssim=median(p["ssim"] for p in patients),
        psnr=median(_number(p["psnr"]) for p in patients),
        best_ncc=max(p["ncc"] for p in patients),
        chance_ncc=fmean(attack["chance_ncc"] for attack in attacks),
    )


def _number(value: float | None) -> float:
    """JSON has no infinity: None stands for it."""
    return math.inf if value is None else float(value)


def budget(epsilon: float) -> str:
    """A budget as people write it."""
    if math.isinf(epsilon):
        return "non-private"
    text = f"{epsilon:.0e}".replace("e+0", "e").replace("e+", "e")
    return text if epsilon >= 1000 and float(text) == epsilon else f"{epsilon:g}"


def table(
    rows: Sequence[Row], metric: str, adversaries: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Titles and values of the table, as text; the same for every format.

    Args:
        rows: at least one, by rising budget.
        metric: name of the utility.
        adversaries: key to title.
    """
    lines = [
        {
            "epsilon": budget(row.epsilon),
            "noise multiplier": f"{row.noise_multiplier:.3g}",
            "epsilon, tight": budget(row.epsilon_tight)
            if math.isinf(row.epsilon_tight)
            else f"{row.epsilon_tight:.3g}",
            metric: f"{row.utility:.3f}",
            "spread": "-" if row.spread is None else f"{row.spread:.3f}",
            "worst case, at most": f"{row.risk.worst_case:.3g}",
            "relaxed, at most": f"{row.risk.relaxed:.3g}",
            "NCC bound, one update": f"{row.risk.ncc_update:.3f}",
            "NCC bound, whole run": f"{row.risk.ncc_run:.3f}",
            **{f"NCC {title}": f"{row.attacks[k].ncc:.3f}" for k, title in adversaries.items()},
            **{f"SSIM {title}": f"{row.attacks[k].ssim:.3f}" for k, title in adversaries.items()},
            "NCC chance": f"{max(row.attacks[key].chance_ncc for key in adversaries):.3f}",
        }
        for row in rows
    ]
    return list(lines[0]), [list(line.values()) for line in lines]


def to_csv(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """The table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *body])
    return text.getvalue()


def to_markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """The table as markdown."""
    lines = [head, ["---:"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
