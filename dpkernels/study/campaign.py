"""Attacks on one trained run: who attacks, with what, and how near they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from dpkernels.attacks import gradient_matching, imprint, linear_optimal, trap_weights
from dpkernels.reconstruction.metrics import Match, chance_ncc, match, prior_ncc
from dpkernels.study.options import ATTACKS, names
from dpkernels.training.privacy import PrivacyPlan
from dpkernels.training.trainer import Exposed

_CHANCE_REPEATS = 50

#: A reconstruction succeeds when its distance 1 - NCC from the record is below this.
ETA = 0.1

#: Groups of patients that were attacked together: their indices, and the candidates found.
Groups = Iterator[tuple[list[int], torch.Tensor]]


@dataclass(frozen=True)
class Adversary:
    """One kind of attacker.

    Attributes:
        title: short, for tables.
        reading: what they know and do, in one sentence.
        attack: what is attacked and with which parameters; yields groups as they are done.
    """

    title: str
    reading: str
    attack: Callable[[Exposed, PrivacyPlan], Groups]


def participations(plan: PrivacyPlan) -> int:
    """Updates that contain one patient in a typical run: q * T, at least one."""
    return max(1, round(plan.sample_rate * plan.steps))


def _optimal(exposed: Exposed, plan: PrivacyPlan, updates: int) -> Groups:
    found = linear_optimal(
        exposed.images,
        updates=updates if plan.noise_multiplier else 1,  # without noise all updates show the same
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
    )
    yield list(range(len(found))), found


def _by_batches(
    attack: Callable[..., torch.Tensor],
    exposed: Exposed,
    plan: PrivacyPlan,
    size: int | None = None,
    **known: Any,
) -> Groups:
    """Attack the user's model.

    Args:
        attack: returns the candidates for one batch.
        exposed: the run.
        plan: its privacy.
        size: patients in a batch; by default as many as a step expects.
        **known: what else the attacker knows.
    """
    size = size or max(1, round(plan.expected_batch_size))
    for batch in torch.arange(len(exposed.images)).split(size):
        group = batch.tolist()

        def loss(output: torch.Tensor, labels: torch.Tensor = exposed.labels[group]) -> Any:
            return exposed.criterion(output, labels)

        yield (
            group,
            attack(
                images=exposed.images[group],
                model=exposed.network,
                loss=loss,
                noise_multiplier=plan.noise_multiplier,
                max_grad_norm=plan.max_grad_norm,
                **known,
            ),
        )


def _imprint(exposed: Exposed, plan: PrivacyPlan) -> Groups:
    means = exposed.images.flatten(1).float().mean(dim=1)
    law = float(means.mean()), float(means.std(correction=0))
    return _by_batches(imprint, exposed, plan, known_means=law)


ADVERSARIES: Mapping[str, Adversary] = {
    "imprint": Adversary(
        "imprint",
        "A malicious server puts a layer with 128 bins in front of the user's model and reads one "
        "update of a batch of the expected size (of the attacked records, where those are fewer: "
        "easier for the attack); the realistic attacker.",
        _imprint,
    ),
    "optimal": Adversary(
        "optimal, one update",
        "Replaces the whole model by one linear layer, knows all other records of the batch and "
        "the norm of the record, and reads one update; nobody without prior knowledge does better.",
        lambda exposed, plan: _optimal(exposed, plan, 1),
    ),
    "optimal-run": Adversary(
        "optimal, whole run",
        "The same, and averages over all updates that contain the record, sample rate times steps "
        "of them, with the weights held still.",
        lambda exposed, plan: _optimal(exposed, plan, participations(plan)),
    ),
    "trap-weights": Adversary(
        "trap weights",
        "A malicious layer with random weights that fire for few records, two rows for each record "
        "of the batch.",
        lambda exposed, plan: _by_batches(trap_weights, exposed, plan),
    ),
    "gradient-matching": Adversary(
        "gradient matching",
        "An honest but curious server searches for the record whose gradient in the user's own "
        "model points where the released one does; it is told that the record was alone.",
        lambda exposed, plan: _by_batches(gradient_matching, exposed, plan, size=1),
    ),
}
DEFAULT_ADVERSARIES = names(ATTACKS)


@dataclass(frozen=True)
class AttackResult:
    """What one adversary reached on one run.

    Attributes:
        adversary: key of `ADVERSARIES`.
        matches: one for each attacked patient.
        chance: mean correlation that as many candidates of pure noise reach.
        reconstructions: [n, ...], the assigned candidates, clipped to the range of the data.
    """

    adversary: str
    matches: tuple[Match, ...]
    chance: float
    reconstructions: np.ndarray

    @property
    def best(self) -> int:
        """Index of the patient who was reconstructed best, by correlation."""
        return max(range(len(self.matches)), key=lambda index: self.matches[index].ncc)

    def median(self, metric: str) -> float:
        """Median over the patients of "ncc", "ssim", "psnr" or "mse"."""
        return float(np.median([getattr(m, metric) for m in self.matches]))

    @property
    def success(self) -> float:
        """Share of the patients whose reconstruction is nearer than `ETA`, in 1 - NCC."""
        return float(np.mean([1 - m.ncc < ETA for m in self.matches]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "title": ADVERSARIES[self.adversary].title,
            "chance_ncc": self.chance,
            "median": {name: self.median(name) for name in ("ncc", "ssim", "psnr", "mse")},
            "best_ncc": self.matches[self.best].ncc,
            "success": self.success,
            "patients": [asdict(m) for m in self.matches],
        }


def attack_run(
    exposed: Exposed,
    plan: PrivacyPlan,
    adversaries: Sequence[str] = DEFAULT_ADVERSARIES,
    on_progress: Callable[[float], None] = lambda share: None,
) -> dict[str, AttackResult]:
    """Attack a run with its own data, clipping bound and noise, through the engine.

    Args:
        exposed: the run's patients, network and loss.
        plan: its privacy; without privacy there is no noise.
        adversaries: keys of `ADVERSARIES`.
        on_progress: called with the share of one adversary's work that was just done.

    Raises:
        ValueError: no such adversary.
    """
    unknown = [name for name in adversaries if name not in ADVERSARIES]
    if unknown:
        raise ValueError(f"--attack must be among {', '.join(ADVERSARIES)}; got {unknown[0]!r}")
    return {
        name: _assess(name, exposed, ADVERSARIES[name].attack(exposed, plan), on_progress)
        for name in adversaries
    }


def guess_without_model(exposed: Exposed) -> float | None:
    """Median correlation of a record with the mean of the others; None for a single record."""
    truths = exposed.images.cpu().numpy()
    return float(np.median(prior_ncc(truths))) if len(truths) > 1 else None


def _assess(
    name: str, exposed: Exposed, groups: Groups, on_progress: Callable[[float], None]
) -> AttackResult:
    truths = exposed.images.cpu().numpy()
    low, high = float(truths.min()), float(truths.max())
    middle = np.full(truths.shape[1:], (low + high) / 2, truths.dtype)
    matches: list[Match] = []
    chances: list[np.ndarray] = []
    reconstructions = []
    for group, found in groups:
        candidates = found.cpu().numpy()
        for m in match(truths[group], candidates, low=low, high=high):
            matches.append(replace(m, truth=group[m.truth]))
            chosen = middle if m.candidate is None else candidates[m.candidate]
            reconstructions.append(np.clip(chosen, low, high))
        chances.append(
            chance_ncc(truths[group], candidates=len(candidates), repeats=_CHANCE_REPEATS).ravel()
        )
        on_progress(len(group) / len(truths))
    chance = float(np.concatenate(chances).mean())
    return AttackResult(name, tuple(matches), chance, np.stack(reconstructions))
