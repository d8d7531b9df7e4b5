"""How far one record moves the released sum in programs that mix samples: docs/pitfalls.md's table.

Nothing tries the programs here. The sensitivity that epsilon is computed for allows 1 C for a
record that is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.engine.support import made_private

PAGE = Path(__file__).parents[3] / "docs" / "pitfalls.md"
SAMPLES = 64
OUTLIER = 17

Batch = tuple[torch.Tensor, ...]
Loss = Callable[[nn.Module, Batch], torch.Tensor]


def without_one(batch: Batch) -> Batch:
    kept = [i for i in range(len(batch[0])) if i != OUTLIER]
    return tuple(t[kept] for t in batch)


def released(model: nn.Module, loss: Loss, batches: list[Batch], bound: float) -> torch.Tensor:
    """The clipped sum of the last of some steps, without noise."""
    _, wrapped, optimizer, _ = made_private(
        model, batches[0][0], max_grad_norm=bound, poisson_sampling=False, trial="off"
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for batch in batches:
        optimizer.zero_grad()
        loss(wrapped, batch).backward()
        optimizer.step()
    gradients = [p.grad.double().flatten() for p in model.parameters() if p.requires_grad]
    return torch.cat(gradients) * optimizer.expected_batch_size


def moved(
    build: Callable[[], nn.Module],
    loss: Loss,
    batch: Batch,
    bound: float = 0.5,
    later: Batch | None = None,
) -> float:
    """Multiples of C by which the sum moves when a record is left out of its batch.

    With `later`, the sum is that of a later step, whose batch does not hold the record.
    """
    sums = []
    for own in (batch, without_one(batch)):
        torch.manual_seed(0)
        sums.append(released(build(), loss, [own] if later is None else [own, later], bound))
    return float((sums[0] - sums[1]).norm()) / bound


class Layers(nn.Module):
    def __init__(self, wide: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, wide), nn.Linear(wide, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class OverBatchMaximum(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x / x.abs().amax())


class BatchStatistics(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x - x.mean(0)) / x.std(0))


class BoundsTheBatchsGradient(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.second.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        if hidden.requires_grad:
            hidden.register_hook(lambda g: g * (1e-3 / g.norm()).clamp(max=1))
        return self.second(hidden)


class RunningCentre(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.centre = torch.zeros(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        output = self.second(torch.tanh(hidden - self.centre))
        self.centre = 0.9 * self.centre + 0.1 * hidden.detach().mean(0)
        return output


class DividedByItsSize(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * SAMPLES / len(x)


class LanguageModel(nn.Module):
    """Returns its loss: a mean over the tokens that count in the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(F.gelu(self.embedding(ids)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Scale(nn.Module):
    """Has no rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(20) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Prototypes(Layers):
    """As many prototypes as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()
        self.prototypes, self.classes = torch.randn(SAMPLES, 20), torch.randn(SAMPLES, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        near = x @ self.scale(self.prototypes[: len(x)]).T
        return super().forward(x) + near @ self.classes[: len(x)]


def classified(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def mixed_up(model: nn.Module, batch: Batch) -> torch.Tensor:
    x, y = batch
    other = torch.arange(len(x)).roll(1)
    output = model(0.6 * x + 0.4 * x[other])
    return 0.6 * F.cross_entropy(output, y) + 0.4 * F.cross_entropy(output, y[other])


def weighted(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], weight=torch.tensor([1.0, 1.0, 100.0]))


def squared(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A regression whose target is far away for one record."""
    x, y = batch
    return (model(x) - torch.where(y == 2, 1e4, 1.0)[:, None]).square().sum(1).mean()


def records(largest: float = 1.0) -> Batch:
    """Records of one kind, and one of another that is so many times as large."""
    torch.manual_seed(3)
    x, y = torch.randn(SAMPLES, 20) * 0.1 + torch.randn(20), torch.zeros(SAMPLES, dtype=torch.long)
    x[OUTLIER] *= largest
    y[OUTLIER] = 2
    return x, y


def texts() -> Batch:
    """One long text among short ones, which begin alike."""
    torch.manual_seed(3)
    ids = torch.randint(50, (1, 64)).repeat(SAMPLES, 1)
    labels = ids.roll(-1, 1)
    labels[torch.arange(SAMPLES) != OUTLIER, 2:] = -100
    return ids, labels


MEASURED: dict[str, Callable[[], float]] = {
    "no mixing": lambda: moved(Layers, classified, records(100.0)),
    "division by the batch's maximum": lambda: moved(OverBatchMaximum, classified, records(100.0)),
    "batch statistics by hand": lambda: moved(BatchStatistics, classified, records(1e4)),
    "a hook that bounds the batch's gradient": lambda: moved(
        BoundsTheBatchsGradient, squared, records(), 1e-4
    ),
    "a mean over the batch's tokens": lambda: moved(
        LanguageModel, lambda model, batch: model(*batch), texts(), 2.0
    ),
    "a running centre, in the step after": lambda: moved(
        RunningCentre, classified, records(1e3), later=records()
    ),
    "prototypes through a module without a rule": lambda: moved(
        Prototypes, classified, records(100.0)
    ),
    "MixUp in the loop": lambda: moved(Layers, mixed_up, records()),
    "class weights in the criterion": lambda: moved(Layers, weighted, records(), 2.0),
    "division by the batch's size": lambda: moved(DividedByItsSize, classified, records(), 3.0),
}


def stated() -> dict[str, float]:
    """By program, what the page says."""
    section = PAGE.read_text().split("## How bad mixing is")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \| ([\d.,]+) C \|", section, re.MULTILINE)
    return {name: float(figure.replace(",", "")) for name, figure in rows}


def test_every_figure_of_the_page_is_measured_here() -> None:
    assert stated().keys() == MEASURED.keys()


@pytest.mark.parametrize("program", MEASURED)
def test_the_figure_of_the_page(program: str) -> None:
    assert MEASURED[program]() == pytest.approx(stated()[program], rel=0.1)


def test_only_what_does_not_mix_stays_within_the_sensitivity() -> None:
    within = {name for name, figure in stated().items() if figure <= 1.0}
    assert within == {"no mixing"}
