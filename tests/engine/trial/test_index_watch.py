"""What a forward pass takes for indices, and whether they come from floats or labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpkernels import ops
from dpkernels.engine.trial import mixing
from dpkernels.engine.trial.index_watch import IndexWatch
from dpkernels.engine.trial.poisons import LARGE, NAN
from dpkernels.ops.fingerprints import reference
from tests.engine.support import Call, cnn, made_private

LOGITS = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 5, (4, 6), generator=torch.Generator().manual_seed(0))
TABLE = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def watched(program: Callable[[], object]) -> IndexWatch:
    with IndexWatch([LABELS]) as watch:
        program()
    return watch


def shifted() -> torch.Tensor:
    labels = F.pad(LABELS, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(LOGITS.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("program", [
    lambda: F.cross_entropy(LOGITS.flatten(0, 1), LABELS.flatten()),
    lambda: F.cross_entropy(LOGITS.movedim(-1, 1), LABELS, reduction="none"),
    lambda: F.nll_loss(LOGITS.log_softmax(-1).flatten(0, 1), LABELS.flatten()),
    lambda: F.cross_entropy(LOGITS[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()),
    shifted,
    lambda: (LABELS != -100).sum(1),
    lambda: LOGITS * (LABELS == 1)[..., None],
    lambda: LABELS.to(torch.float32).mean(),
    lambda: LABELS.where(LABELS > 0, -100),
])  # fmt: skip
def test_labels_of_a_loss_are_no_indices(program: Callable[[], object]) -> None:
    watch = watched(program)
    assert not watch.from_labels
    assert not watch.from_floats


@pytest.mark.parametrize("program", [
    lambda: F.embedding(LABELS, TABLE),
    lambda: F.embedding(F.pad(LABELS, (1, 0))[:, :-1], TABLE),
    lambda: TABLE[LABELS],
    lambda: TABLE[LABELS.flatten() + 0],
    lambda: F.one_hot(LABELS, 5),
    lambda: LOGITS.gather(-1, LABELS[..., None]),
    lambda: torch.take(TABLE, LABELS),
    lambda: torch.zeros(4, 6, 5).scatter(-1, LABELS.clone()[..., None], 1.0),
    lambda: F.embedding_bag(LABELS, TABLE),
    lambda: TABLE.index_select(0, LABELS.view(-1)),
    lambda: F.embedding(LABELS.to(torch.int32), TABLE),
])  # fmt: skip
def test_labels_that_are_indices(program: Callable[[], object]) -> None:
    assert watched(program).from_labels


@pytest.mark.parametrize("program", [
    lambda: LOGITS.long(), lambda: LOGITS.to(torch.int32), lambda: LOGITS.int().long(),
    lambda: LOGITS.sort(-1), lambda: LOGITS.argsort(-1), lambda: LOGITS.topk(2, -1),
    lambda: torch.bucketize(LOGITS, torch.linspace(-1.0, 1.0, 4)),
    lambda: torch.searchsorted(torch.linspace(-1.0, 1.0, 4), LOGITS),
    lambda: torch.zeros(4, 6, 5, dtype=torch.long).copy_(LOGITS),
    lambda: LOGITS.kthvalue(2, -1),
])  # fmt: skip
def test_integers_made_from_floats(program: Callable[[], object]) -> None:
    assert watched(program).from_floats


@pytest.mark.parametrize("program", [
    lambda: LOGITS.argmax(-1), lambda: LOGITS.max(-1), lambda: LOGITS > 0,
    lambda: LOGITS.double().half(), lambda: LABELS.to(torch.int32), lambda: LABELS.sort(-1),
    lambda: LOGITS.view(4, -1), lambda: torch.zeros(4, 6, 5).copy_(LOGITS),
    lambda: F.embedding(LABELS + 0, TABLE), lambda: LOGITS.view(torch.int32),
    lambda: ops.fingerprint(LOGITS), lambda: reference.fingerprint(LOGITS),
])  # fmt: skip
def test_what_stays_in_range_or_makes_no_integers(program: Callable[[], object]) -> None:
    """The place of the largest value is in range also where all are NaN.

    Fingerprints, which a trial takes of every layer, make no integers that a model could use.
    """
    assert not watched(program).from_floats


class Words(nn.Module):
    """Returns its loss; ids are indices, labels are not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.embedding(ids))
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        each = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
        return (each.sum(1) / (labels != -100).sum(1).clamp(min=1)).mean()


class Quantised(nn.Module):
    """Looks up what the floats of its input say."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding((x.sigmoid() * 8).long()).mean(1))


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("build", "batch", "unable"), [
    (cnn, (IMAGES,), set()),
    (Quantised, (IMAGES.flatten(1),), {NAN, LARGE}),
    (Words, (LABELS, LABELS.clone()), set()),
    (Words, {"labels": LABELS.clone(), "ids": LABELS}, set()),
    (lambda: Call(Words(), lambda m, ids: m(ids, ids)), (LABELS,), set()),
])  # fmt: skip
def test_a_trial_leaves_out_what_would_end_a_process_on_a_gpu(
    build: Callable[[], nn.Module], batch: Any, unable: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixing, "indices_abort", lambda session: True)
    _, model, _, _ = made_private(build(), IMAGES)
    model(**batch) if isinstance(batch, dict) else model(*batch)
    assert model.session.trials.turn == 1
    assert model.session.trials.unable == unable
