"""Losses inside the model, and criteria beside it, that couple samples: refused, with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpkernels import PrivacyEngine
from dpkernels.engine.trial.findings import Kind
from tests.engine.hard_cases.refusals import assert_refused, normal, own_loss, refusal
from tests.engine.support import values
from tests.engine.truth import assert_private

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class WithLoss(nn.Module):
    """A model that returns a loss of its own: alone, beside logits, or several.

    Args:
        loss: of logits [B, T, 4] and labels [B, T].
        returns: what the model returns.
    """

    def __init__(self, loss: Loss, returns: str = "loss", scale: float = 1.0) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 4)
        self.loss, self.returns, self.scale = loss, returns, scale

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.head(self.body(x).tanh())
        loss = self.loss(logits, labels)
        return {
            "loss": lambda: loss,
            "vector": lambda: loss[None],
            "beside": lambda: (loss, logits * self.scale),
            "losses": lambda: (loss, logits.square().mean()),
        }[self.returns]()


def batch(samples: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, 6, 5] and labels [B, 6], of which each sample ignores as many as its number says."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (samples, 6), generator=draw)
    ignored = torch.arange(6) < torch.arange(samples)[:, None] % 5
    return normal(samples, 6, 5, seed=seed), labels.masked_fill(ignored, -100)


def tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def weighted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    weight = torch.tensor([1.0, 5.0, 0.2, 3.0]).to(logits)
    return F.cross_entropy(logits.movedim(-1, 1), labels.clamp(min=0), weight)


def dice(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    chosen = logits.softmax(-1)[..., 1]
    truth = (labels == 1).to(logits)
    return 1 - 2 * (chosen * truth).sum() / (chosen.sum() + truth.sum())


def contrastive(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(logits.mean(1))
    return F.cross_entropy(unit @ unit.T / 0.1, torch.arange(len(unit)))


def focal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Over the number of positives in the batch, as detectors have it."""
    truth = (labels == 1).to(logits)
    own = F.binary_cross_entropy_with_logits(logits[..., 1], truth, reduction="none")
    return ((1 - torch.exp(-own)).square() * own).sum() / truth.sum().clamp(min=1)


def hardest(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    own = F.cross_entropy(logits.movedim(-1, 1), labels.clamp(min=0), reduction="none").mean(1)
    return own.topk(len(own) // 2).values.mean()


def variance(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.relu(1 - logits.mean(1).std(0)).mean()


def logarithm(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.square().mean().log()


def balance(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The load-balancing term of a mixture of experts."""
    shares = logits.softmax(-1).flatten(0, 1)
    return 4 * (shares.mean(0) * shares.detach().mean(0)).sum()


COUPLED: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (tokens, weighted, dice, contrastive, focal, hardest, variance, logarithm, balance)
}


@pytest.mark.parametrize("returns", ["loss", "vector", "beside", "losses"])
@pytest.mark.parametrize("name", COUPLED)
def test_losses_inside_the_model_are_refused(name: str, returns: str) -> None:
    torch.manual_seed(0)
    message = refusal(WithLoss(COUPLED[name], returns), [batch(7)], own_loss)
    assert_refused(message, "layer '", Kind.LOSS)


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("samples", [3, 64])
def test_losses_beside_large_logits_are_refused(name: str, samples: int) -> None:
    torch.manual_seed(0)
    model = WithLoss(COUPLED[name], "beside", scale=1e6)
    batches = [batch(samples, seed) for seed in range(4)]
    message = refusal(model, batches, own_loss, trial="every")
    assert_refused(message, "layer '", Kind.LOSS)


@pytest.mark.parametrize("name", sorted(COUPLED.keys() - {"contrastive"}))
def test_losses_over_a_large_batch_are_refused(name: str) -> None:
    torch.manual_seed(0)
    message = refusal(WithLoss(COUPLED[name]), [batch(1000)], own_loss)
    assert_refused(message, "layer '", Kind.LOSS)


def remedy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The words of the remedy."""
    loss = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
    return (loss.flatten(1).sum(1) / (labels != -100).flatten(1).sum(1).clamp(min=1)).mean()


@pytest.mark.parametrize("returns", ["loss", "vector", "beside"])
def test_a_mean_over_each_samples_tokens_is_private(returns: str) -> None:
    torch.manual_seed(0)
    given = batch(6)
    model = WithLoss(remedy, returns).double()
    assert_private(model, lambda m, b: own_loss(m, b).sum(), (given[0].double(), given[1]))
    assert remedy.__doc__ is not None
    assert "reduction='none'" in Kind.LOSS.value


def test_a_loss_taken_outside_the_model_is_private() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return remedy(model(batch[0]), batch[1])

    assert_private(model, loss, (values(6, 6, 5), batch(6)[1]))


@pytest.mark.parametrize("name", COUPLED)
def test_criteria_are_found(name: str) -> None:
    torch.manual_seed(0)
    engine, model = PrivacyEngine(), nn.Linear(5, 4)
    with pytest.raises(ValueError, match=r"^criterion: .*couples samples.*per-sample losses"):
        engine.check_per_sample(model, COUPLED[name], batch(7))
    engine.check_per_sample(model, remedy, batch(7))
