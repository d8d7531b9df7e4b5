"""The privacy report of a run: the numbers of the guarantee, and what they mean in words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dpkernels.accounting import trade_off
from dpkernels.reconstruction import RiskReport, risk_report
from dpkernels.training.config import RunConfig
from dpkernels.training.privacy import PrivacyPlan

_LEAST_ERROR = 1e-6
_BISECTIONS = 14


@dataclass(frozen=True)
class PrivacyReport:
    """What a run guarantees, and what it does not.

    Attributes:
        plan: privacy parameters.
        steps: steps counted.
        epsilon: at plan.delta under plan.accountant; None without privacy.
        epsilon_rdp: the same steps under Opacus' RDP accountant, which most published budgets mean.
        membership: bound on the share of right guesses about one patient's participation.
        clipped_fraction: mean share of drawn patients whose gradient was clipped; None if unknown.
        risk: what could be reconstructed; None without privacy.
        by_products: what the run shows outside the guarantee.
        notes: about the data (grouping, skipped files).
    """

    plan: PrivacyPlan
    steps: int
    epsilon: float | None
    epsilon_rdp: float | None
    membership: float | None
    clipped_fraction: float | None
    risk: RiskReport | None
    by_products: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for privacy_report.json."""
        return {
            **self.plan.to_dict(),
            "adjacency": f"add or remove one {self.plan.unit} with everything recorded of it",
            "planned_steps": self.plan.steps,
            "steps": self.steps,
            "expected_batch_size": self.plan.expected_batch_size,
            "sampler": f"Poisson over {self.plan.unit}s, {self._entropy()}",
            "noise": self._entropy(),
            "denominator": "sample_rate * patients (fixed), never the drawn batch",
            "epsilon": self.epsilon,
            "epsilon_rdp": self.epsilon_rdp,
            "membership_success": self.membership,
            "clipped_fraction": self.clipped_fraction,
            "risk": None if self.risk is None else json.loads(self.risk.to_json()),
            "by_products": list(self.by_products),
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        """The same for a reader, for privacy_report.md."""
        parts = ["# Privacy report", "", *self._reading(), "", "## Numbers", "", *self._table()]
        if self.risk is not None:
            parts += ["", re.sub("^#", "##", self.risk.to_markdown(), flags=re.MULTILINE)]
        parts += ["", "## Not covered by the guarantee", ""]
        parts += [f"- {text}" for text in self.by_products]
        if self.notes:
            parts += ["", "## Notes on the data", "", *[f"- {text}" for text in self.notes]]
        return "\n".join(parts) + "\n"

    def _entropy(self) -> str:
        seed = self.plan.insecure_fixed_noise
        return "operating-system entropy" if seed is None else f"INSECURE fixed seed {seed}"

    def _reading(self) -> list[str]:
        plan = self.plan
        if plan.insecure_fixed_noise is not None:
            return [
                f"**This model has no privacy guarantee: noise and sampling came from the fixed "
                f"seed {plan.insecure_fixed_noise} (insecure_fixed_noise).** Whoever knows the "
                f"seed can subtract the noise. Use such a run for tests only."
            ]
        if self.epsilon is None or self.membership is None:
            return [
                "**This model has no privacy guarantee.** It was trained without clipping and "
                "noise, for comparison. Do not release it if its training data are private."
            ]
        return [
            f"The weights of this model are ({self.epsilon:.4g}, {plan.delta:g})-differentially "
            f"private. The unit is the {plan.unit}: whether one {plan.unit}, with everything "
            f"recorded of it, was among the {plan.patients} training {plan.unit}s changes the "
            f"probability of any outcome by at most a factor e^{self.epsilon:.3g}, up to an "
            f"additive {plan.delta:g}.",
            "",
            f"In words: if a fair coin decides whether one given {plan.unit} takes part, someone "
            f"who sees the weights and knows every other {plan.unit} guesses the coin right with "
            f"probability at most {self.membership:.3g}. {_verdict(self.membership)}",
        ]

    def _table(self) -> list[str]:
        plan = self.plan
        rows: list[tuple[str, str]] = [
            ("Privacy unit", f"{plan.unit} (all images, crops and augmentations together)"),
            (f"Training {plan.unit}s N", str(plan.patients)),
            ("Sample rate q", f"{plan.sample_rate:.6g} (Poisson, each {plan.unit} by itself)"),
            ("Divisor q N", f"{plan.expected_batch_size:.6g} (fixed)"),
            ("Steps T", f"{self.steps} of {plan.steps} planned"),
            (f"Views per {plan.unit} and step", str(plan.views_per_patient)),
        ]
        if plan.enabled:
            clipped = "unknown" if self.clipped_fraction is None else f"{self.clipped_fraction:.1%}"
            rows += [
                ("Noise multiplier sigma", f"{plan.noise_multiplier:.6g}"),
                ("Clipping bound C", f"{plan.max_grad_norm:g}"),
                ("Delta", f"{plan.delta:g}"),
                (f"Epsilon ({plan.accountant} accountant)", f"{self.epsilon:.6g}"),
                ("Epsilon (Opacus RDP accountant)", _number(self.epsilon_rdp)),
                ("Participation guessed right", f"at most {_number(self.membership)}"),
                (f"Share of {plan.unit}s clipped, mean", clipped),
                ("Noise and sampling from", self._entropy()),
            ]
        return ["| | |", "|---|---|", *[f"| {name} | {value} |" for name, value in rows]]


def build_report(
    config: RunConfig,
    plan: PrivacyPlan,
    steps: int,
    columns: dict[str, list[float]],
    by_products: Sequence[str],
    notes: Sequence[str],
    dimension: int,
) -> PrivacyReport:
    """Put the report together.

    Args:
        config: of the run.
        plan: its privacy parameters.
        steps: steps counted so far.
        columns: of metrics.csv.
        by_products: what this task shows outside the guarantee, beyond what every task does.
        notes: about the data.
        dimension: values in one view of a patient (voxels times modalities).
    """
    clipped = [value for value in columns["clipped_fraction"] if math.isfinite(value)]
    guaranteed = plan.enabled and plan.insecure_fixed_noise is None
    return PrivacyReport(
        plan=plan,
        steps=steps,
        epsilon=plan.epsilon(steps),
        epsilon_rdp=_epsilon_rdp(plan, steps),
        membership=_membership_success(plan, steps) if guaranteed else None,
        clipped_fraction=fmean(clipped) if clipped else None,
        risk=_risk(plan, steps, dimension) if guaranteed and plan.patients > 1 else None,
        by_products=(*_by_products(config, plan.unit), *by_products),
        notes=tuple(notes),
    )


def _epsilon_rdp(plan: PrivacyPlan, steps: int) -> float | None:
    try:
        return plan.epsilon(steps, accountant="rdp")
    except ValueError:
        return None


def _risk(plan: PrivacyPlan, steps: int, dimension: int) -> RiskReport:
    """Bounds on matching and reconstruction; the prior is one among the training patients."""
    return risk_report(
        noise_multiplier=plan.noise_multiplier,
        sample_rate=plan.sample_rate,
        steps=steps,
        delta=plan.delta,
        dataset_size=plan.patients,
        dimension=dimension,
    )


def _by_products(config: RunConfig, unit: str) -> tuple[str, ...]:
    texts = [
        "Loss, gradient norms and clipped share per step (metrics.csv, progress.png, tensorboard/) "
        f"are computed from the training {unit}s without noise: keep them inside.",
        f"Metrics and pictures show held-out {unit}s, who take no part in training and whom this "
        "guarantee does not protect.",
        f"The number of training {unit}s is treated as public.",
        f"Settings chosen by comparing several runs on these {unit}s spend privacy that is not "
        f"counted here; the budgets of all runs on the same {unit}s add up.",
    ]
    if config.data.validation_share:
        texts.append(f"The validation curve shows validation {unit}s; it steers nothing here.")
    if config.training.init_from:
        texts.append(
            f"Training started from {config.training.init_from}: if those weights saw private "
            f"{unit}s, their budget adds to this one."
        )
    return tuple(texts)


def _membership_success(plan: PrivacyPlan, steps: int) -> float:
    """An upper bound on the share of right guesses about one patient's participation.

    The trade-off function f is convex and symmetric, so a guess by a fair coin errs least where
    alpha = f(alpha); every alpha with f(alpha) >= alpha lies below that point, and 1 - alpha above
    the share of right guesses (docs/math.md, section 5).
    """
    low, high = _LEAST_ERROR, 0.5
    if not _misses(plan, steps, low) >= low:
        return 1.0
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _misses(plan, steps, middle) >= middle else (low, middle)
    return 1 - low


def _misses(plan: PrivacyPlan, steps: int, alpha: float) -> float:
    return float(
        trade_off(
            alpha,
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            steps=steps,
        )
    )


def _verdict(success: float) -> str:
    scale = (
        (0.6, "That is little better than the coin: a strong guarantee."),
        (0.9, "That is better than the coin and far from certainty, against an attacker who knows "
         "far more than real ones do."),
        (0.99, "That is a weak guarantee: such an attacker may be right nearly always."),
        (1.0, "**That is next to no guarantee: such an attacker may be certain.** What the noise "
         "still hides, and only from attackers who know less, is the reconstruction risk below."),
    )  # fmt: skip
    return next(text for limit, text in scale if success <= limit)


def _number(value: float | None) -> str:
    return "not available" if value is None else f"{value:.6g}"
