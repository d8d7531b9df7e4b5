"""A one-run empirical audit: does the engine, as it runs, keep the accountant's epsilon?

A canary is a record whose gradient has a direction of its own, and is far longer than the clipping
bound. A fair coin decides whether a canary is in the data set; the engine trains once, end to end;
the released gradients, added up along a canary's direction, tell how likely the canary was in
(docs/math.md, section 4, "Audit").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels.accounting.audit import audit_epsilon
from dpkernels.accounting.checks import check_count, check_number
from dpkernels.engine.privacy_engine import PrivacyEngine

#: shares of the canaries that are guessed; each share's bound gets an equal part of the failure
#: probability, so that the best bound may be taken
_GUESSED = (0.1, 0.3, 1.0)
#: ordinary records that train beside the canaries, and their features
_ORDINARY, _FEATURES = 64, 8
#: norm of a canary's gradient in units of the clipping bound
_LOUDNESS = 1000.0


@dataclass(frozen=True)
class AuditReport:
    """Outcome of :func:`one_run_audit`.

    Attributes:
        epsilon: the accountant's epsilon of the run, at `delta`.
        lower_bound: the lower bound on epsilon that the attack proves, at `delta` and `confidence`.
        ceiling: the largest lower bound that so many canaries could have shown.
        delta: the delta of `epsilon`, `lower_bound` and `ceiling`.
        confidence: probability, at least, that a correct engine gets ``lower_bound <= epsilon``.
        canaries: number of canaries.
        guesses: number of coins guessed for `lower_bound`.
        correct: number of right guesses among `guesses`.
    """

    epsilon: float
    lower_bound: float
    ceiling: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int

    @property
    def violated(self) -> bool:
        """Whether the run leaked more than the accountant's epsilon."""
        return self.lower_bound > self.epsilon

    def to_text(self) -> str:
        """The report in plain words."""
        if self.violated:
            verdict = (
                "VIOLATION: more leaked than was counted. A correct engine gives this result with "
                f"probability at most {1.0 - self.confidence:.2g}."
            )
        else:
            too_few = (
                ", less than was counted: for a test that can fail take more of them, fewer steps, "
                "or a smaller delta or confidence"
            )
            verdict = (
                "No violation found: the attack stays within the budget.\n"
                f"So many canaries can show an epsilon of {self.ceiling:.3g} at most"
                f"{too_few if self.ceiling <= self.epsilon else ''}."
            )
        return (
            f"accountant   epsilon = {self.epsilon:.4g} at delta = {self.delta:g}\n"
            f"attack       epsilon >= {self.lower_bound:.4g} ({self.correct} of {self.guesses} "
            f"guesses right, {self.canaries} canaries, confidence {self.confidence:.9g})\n{verdict}"
        )


class _AuditedModel(nn.Module):
    """Predicts from the features, and adds one weight for every canary."""

    def __init__(self, canaries: int):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(_FEATURES, _FEATURES), nn.Tanh(), nn.Linear(_FEATURES, 1)
        )
        self.canary = nn.Linear(canaries, 1, bias=False)

    def forward(
        self, features: torch.Tensor, directions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.backbone(features), self.canary(directions)


def one_run_audit(
    *,
    noise_multiplier: float = 2.0,
    sample_rate: float = 1.0,
    steps: int = 1,
    delta: float = 1e-6,
    canaries: int = 2000,
    max_grad_norm: float = 1.0,
    clipping: str = "flat",
    confidence: float = 0.99,
    engine: PrivacyEngine | None = None,
    generator: torch.Generator | None = None,
    noise_generator: torch.Generator | None = None,
) -> AuditReport:
    """Train once with canaries under the engine, attack the released gradients, and compare.

    Args:
        noise_multiplier: std of the noise divided by `max_grad_norm`.
        sample_rate: probability with which a record joins a step, in (0, 1].
        steps: number of training steps.
        delta: in (0, 1).
        canaries: number of canaries; more canaries can show a larger epsilon.
        max_grad_norm: clipping bound C.
        clipping: ``"flat"`` or ``"automatic"``.
        confidence: in (0, 1): how rarely a correct engine may be accused.
        engine: runs the training; None makes a new one.
        generator: flips the coins and makes the data; None for PyTorch's global generator, which
            draws the batches in any case (but see ``secure_mode``).
        noise_generator: seeds the noise, for tests.

    Returns:
        The accountant's epsilon, the attack's lower bound, and how they compare.

    Raises:
        ValueError: an argument is out of range.
    """
    check_number("sample_rate", sample_rate, above=0.0, at_most=1.0)
    check_count("steps", steps)
    check_count("canaries", canaries, at_least=10)
    if clipping not in ("flat", "automatic"):
        raise ValueError(f"clipping={clipping!r}: expected 'flat' or 'automatic'")
    ceiling = audit_epsilon(
        canaries=canaries, guesses=canaries, correct=canaries, delta=delta,
        confidence=_each(confidence),
    )  # fmt: skip
    coins = torch.rand(canaries, generator=generator) < 0.5
    dataset = _dataset(coins, _LOUDNESS * max_grad_norm, generator)
    model = _AuditedModel(canaries)
    engine = PrivacyEngine() if engine is None else engine
    batch_size = max(1, round(sample_rate * len(dataset)))
    private_model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        data_loader=DataLoader(dataset, batch_size=batch_size),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        clipping=clipping,
        noise_generator=noise_generator,
    )
    scores = torch.zeros(canaries)
    taken = 0
    while taken < steps:
        for features, directions, targets, present in loader:
            optimizer.zero_grad()
            predicted, canary = private_model(features, directions)
            (present * (predicted - targets).square() + canary).mean().backward()
            gradient = model.canary.weight.grad
            if gradient is None:
                raise ValueError("engine: it released no gradient, expected one in p.grad")
            scores += gradient.flatten()
            optimizer.step()
            taken += 1
            if taken == steps:
                break
    epsilon = float(engine.get_epsilon(delta))
    bound, guesses, correct = _best_bound(scores, coins, delta, confidence)
    return AuditReport(epsilon, bound, ceiling, delta, confidence, canaries, guesses, correct)


def _dataset(
    coins: torch.Tensor, loudness: float, generator: torch.Generator | None
) -> TensorDataset:
    """Ordinary records, then a row for each canary: without gradient where the canary is out.

    The number of records is public, so a canary that is out leaves an empty row behind.
    """
    count = len(coins)
    features = torch.randn(_ORDINARY, _FEATURES, generator=generator)
    directions = torch.cat([torch.zeros(_ORDINARY, count), loudness * torch.diag(coins.float())])
    present = torch.cat([torch.ones(_ORDINARY), coins.float()]).unsqueeze(1)
    return TensorDataset(
        torch.cat([features, torch.zeros(count, _FEATURES)]),
        directions,
        torch.cat([features.sum(1, keepdim=True), torch.zeros(count, 1)]),
        present,
    )


def _each(confidence: float) -> float:
    """The confidence of each bound, if the best bound is to have `confidence`."""
    return 1.0 - (1.0 - confidence) / len(_GUESSED)


def _best_bound(
    scores: torch.Tensor, coins: torch.Tensor, delta: float, confidence: float
) -> tuple[float, int, int]:
    """Lower bound, guesses and correct guesses: highest scores are guessed in, lowest out."""
    ranked = coins[scores.argsort(descending=True)]
    bounds = []
    for share in _GUESSED:
        half = max(1, round(share * len(coins) / 2))
        correct = int(ranked[:half].sum()) + int((~ranked[-half:]).sum())
        bound = audit_epsilon(
            canaries=len(coins), guesses=2 * half, correct=correct, delta=delta,
            confidence=_each(confidence),
        )  # fmt: skip
        bounds.append((bound, 2 * half, correct))
    return max(bounds)
