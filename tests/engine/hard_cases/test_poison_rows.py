"""Rows that are not samples, branches, pairs of samples, and batches of every form."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from dpkernels.engine.trial.findings import Kind
from tests.engine.hard_cases.refusals import Around, assert_refused, normal, refusal
from tests.engine.support import Call, squared_loss, values
from tests.engine.truth import assert_private


def one_takes_another(i: int, j: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Sample j has a share of sample i; nobody else is touched."""

    def program(h: torch.Tensor) -> torch.Tensor:
        return h.index_add(0, torch.tensor([j]), h[i : i + 1], alpha=0.5)

    return program


@pytest.mark.parametrize(("i", "j"), itertools.permutations(range(8), 2))
def test_every_pair_of_samples_is_found(i: int, j: int) -> None:
    torch.manual_seed(0)
    batches = [(normal(8, 5, seed=seed),) for seed in range(4)]
    message = refusal(Around(one_takes_another(i, j)), batches, trial="every")
    assert_refused(message, f"layer 'second': the activations of sample {j} move", Kind.STATISTICS)


@pytest.mark.parametrize(("i", "j"), [(5, 6), (0, 31), (12, 13), (31, 0), (13, 12)])
def test_pairs_that_differ_in_the_first_bit_are_found_at_the_first_batch(i: int, j: int) -> None:
    torch.manual_seed(0)
    message = refusal(Around(one_takes_another(i, j)), [(normal(32, 5),)])
    assert_refused(message, f"layer 'second': the activations of sample {j} move", Kind.STATISTICS)


@pytest.mark.parametrize(("i", "j"), [(12, 14), (16, 0), (2, 8)])
def test_other_pairs_are_found_at_the_doubling_batches(i: int, j: int) -> None:
    torch.manual_seed(0)
    batches = [(normal(32, 5, seed=seed),) for seed in range(64)]
    message = refusal(Around(one_takes_another(i, j)), batches[:1], trial="first")
    assert message is None
    message = refusal(Around(one_takes_another(i, j)), batches)
    assert_refused(message, f"layer 'second': the activations of sample {j} move", Kind.STATISTICS)


class Branching(nn.Module):
    """Takes one of two layers by a condition on the whole batch, or on each sample."""

    def __init__(self, condition: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.condition = nn.Linear(5, 3), nn.Linear(5, 3), condition

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        condition = self.condition(x)
        if condition.ndim:
            return torch.where(condition[:, None], self.one(x), self.two(x))
        return self.one(x) if bool(condition) else self.two(x)


@pytest.mark.parametrize("condition", [
    lambda x: x.max() > 50.0, lambda x: x.abs().mean() > 50.0, lambda x: (x > 50.0).any(),
    lambda x: x.norm() > 1e3, lambda x: (x.abs() < 50.0).all(), lambda x: x.var() < 50.0,
])  # fmt: skip
@pytest.mark.parametrize("samples", [3, 64, 2000])
def test_branches_are_refused(
    condition: Callable[[torch.Tensor], torch.Tensor], samples: int
) -> None:
    torch.manual_seed(0)
    message = refusal(Branching(condition), [(normal(samples, 5).clamp(-4, 4),)])
    assert_refused(message, "layer '", Kind.BRANCH)


@pytest.mark.parametrize("samples", [3, 7, 64])
def test_a_branch_on_the_sign_of_the_mean_is_refused(samples: int) -> None:
    """Which side of zero the exchanged half falls on is chance, the large quarter's is not."""
    torch.manual_seed(0)
    batches = [(normal(samples, 5, seed=seed),) for seed in range(8)]
    message = refusal(Branching(lambda x: x.mean() > 0), batches, trial="every")
    assert_refused(message, "layer '", Kind.BRANCH)


def test_a_branch_of_each_sample_is_private() -> None:
    torch.manual_seed(0)
    model = Branching(lambda x: x.mean(1) > 0).double()
    assert_private(model, squared_loss, (values(6, 5),))


class Tables(nn.Module):
    """A layer that runs once for everybody: on prototypes, positions, or a table."""

    def __init__(self, each: bool, use: str) -> None:
        super().__init__()
        self.layer, self.each, self.use = nn.Linear(5, 5), each, use
        self.register_buffer("prototypes", normal(4, 5, seed=9).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.prototypes.to(x.dtype)
        if self.each:
            made = self.layer(rows.expand(len(x), 4, 5))
            return torch.einsum("bd,bpd->bp", x, made)
        made = self.layer(rows)
        return {
            "product": lambda: x @ made.T,
            "distance": lambda: torch.cdist(x, made),
            "sum": lambda: x + made.sum(0),
            "row": lambda: x + made,
        }[self.use]()


@pytest.mark.parametrize("use", ["product", "distance", "sum"])
def test_a_layer_on_prototypes_is_refused(use: str) -> None:
    torch.manual_seed(0)
    message = refusal(Tables(False, use), [(normal(4, 5),)])
    assert_refused(message, "layer 'layer': the backprops of sample", Kind.ROWS)


def test_a_layer_on_prototypes_of_each_sample_is_private() -> None:
    torch.manual_seed(0)
    assert_private(Tables(True, "product").double(), squared_loss, (values(4, 5),))


class Positions(nn.Embedding):
    """Embeds the positions of a sequence, once for the batch or for every sample."""

    each = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        return x + super().forward(places.expand(len(x), -1) if self.each else places)


@pytest.mark.parametrize("samples", [4, 5, 9])
def test_positions_embedded_once_are_refused_and_once_a_sample_are_private(samples: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Positions(4, 5), nn.Linear(5, 3)).double()
    message = refusal(model, [(normal(samples, 4, 5).double(),)])
    assert message is None or message.startswith("layer '0'"), message
    model[0].each = True
    assert_private(model, squared_loss, (values(samples, 4, 5),))


class Hyper(nn.Module):
    """Weights that a layer makes from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(4, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.scale(self.table(torch.arange(4))).T


def test_weights_made_from_a_table_are_refused() -> None:
    torch.manual_seed(0)
    message = refusal(Hyper(), [(normal(4, 5),)])
    assert_refused(message, "layer '", Kind.ROWS)


class Sequences(nn.Module):
    """A sequence model [B, T, 5] whose layer takes the samples on one axis or the other."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.enter, self.layer, self.head = nn.Linear(5, 8), layer, nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(self.enter(x))
        return self.head(hidden[0] if isinstance(hidden, tuple) else hidden)


class SelfAttention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


SEQUENCES: dict[str, Callable[[bool], nn.Module]] = {
    "LSTM": lambda first: nn.LSTM(8, 8, batch_first=first),
    "GRU": lambda first: nn.GRU(8, 8, batch_first=first),
    "attention": SelfAttention,
    "encoder": lambda first: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=first),
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("samples", [4, 6])
def test_sequence_first_in_the_place_of_batch_first_is_refused(name: str, samples: int) -> None:
    torch.manual_seed(0)
    message = refusal(Sequences(SEQUENCES[name](False)), [(normal(samples, 4, 5),)])
    assert message is not None
    assert "batch_first" in message, message


@pytest.mark.parametrize("name", SEQUENCES)
def test_batch_first_is_private(name: str) -> None:
    torch.manual_seed(0)
    assert_private(Sequences(SEQUENCES[name](True)).double(), squared_loss, (values(4, 4, 5),))


UNROWED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda y: y.mean(0),
    "kept_mean": lambda y: y.mean(0, keepdim=True),
    "covariance": lambda y: y.flatten(0, 1).T @ y.flatten(0, 1),
    "tokens": lambda y: y.flatten(0, 1).softmax(0),
    "centred_tokens": lambda y: y.flatten(0, 1) - y.mean((0, 1)),
}


@pytest.mark.parametrize("name", UNROWED)
def test_outputs_without_a_row_for_each_sample(name: str) -> None:
    torch.manual_seed(0)
    model = Call(nn.Linear(5, 4), lambda layer, x: UNROWED[name](layer(x)))
    message = refusal(model, [(normal(7, 6, 5),)], lambda m, b: m(*b).square().sum())
    assert_refused(message, "layer 'module': the backprops", Kind.OUTPUT)


def test_tokens_of_all_samples_in_one_axis_are_private() -> None:
    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return model(*batch).square().sum(1).mean()

    torch.manual_seed(0)
    model = Call(nn.Linear(5, 4), lambda layer, x: layer(x).flatten(0, 1)).double()
    assert_private(model, loss, (values(7, 6, 5),))


def centred(h: torch.Tensor) -> torch.Tensor:
    return h - h.mean(0)


def test_double_precision() -> None:
    message = refusal(Around(centred).double(), [(normal(7, 5).double(),)])
    assert_refused(message, "layer 'second': the activations", Kind.STATISTICS)


@pytest.mark.parametrize("samples", [3, 64, 2000])
def test_autocast(samples: int) -> None:
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        message = refusal(Around(centred), [(normal(samples, 5),)])
    assert_refused(message, "layer 'second': the activations", Kind.STATISTICS)


def test_views() -> None:
    """A mean of a sample's own views is its own; one of the batch is not."""
    torch.manual_seed(0)

    def over_views(h: torch.Tensor) -> torch.Tensor:
        pairs = h.unflatten(0, (-1, 2))
        return (pairs - pairs.mean(1, keepdim=True)).flatten(0, 1)

    message = refusal(Around(centred), [(normal(8, 5),)], views_per_sample=2)
    assert_refused(message, "layer 'second': the activations", Kind.STATISTICS)
    model = Around(over_views).double()
    assert_private(model, squared_loss, (values(8, 5),), views_per_sample=2)
    message = refusal(Around(over_views), [(normal(8, 5),)])
    assert_refused(message, "layer 'second': the activations", Kind.STATISTICS)


class SampleSecond(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis, self.enter, self.layer = axis, nn.Linear(5, 5), nn.LSTM(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        return self.layer(h - h.mean(self.axis, keepdim=True))[0]


def test_samples_on_the_second_axis() -> None:
    torch.manual_seed(0)
    message = refusal(SampleSecond(1), [(normal(4, 6, 5),)], batch_first=False)
    assert_refused(message, "layer 'layer': the activations", Kind.STATISTICS)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return model(*batch).square().sum((0, 2)).mean()

    model, x = SampleSecond(0).double(), values(6, 4, 5).transpose(0, 1)
    assert_private(model, loss, (x,), batch_first=False)


class Nested(nn.Module):
    """Takes a nested dict, or keywords, and mixes samples of one of its entries."""

    def __init__(self, entry: str) -> None:
        super().__init__()
        self.entry, self.one, self.two = entry, nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, batch: dict[str, Any] | None = None, **named: Any) -> torch.Tensor:
        batch = dict(batch or named)
        batch["inner"] = dict(batch["inner"])
        where = batch if self.entry in batch else batch["inner"]
        where[self.entry] = centred(where[self.entry])
        return self.one(batch["image"]) + self.two(batch["inner"]["age"] + batch["inner"]["sex"][0])


@pytest.mark.parametrize(("entry", "layer"), [("image", "one"), ("age", "two")])
@pytest.mark.parametrize("named", [False, True])
def test_nested_arguments(entry: str, layer: str, named: bool) -> None:
    torch.manual_seed(0)
    batch = {"image": normal(7, 5), "inner": {"age": normal(7, 5, seed=1), "sex": [normal(5)]}}

    def loss(model: nn.Module, batch: tuple[Any, ...]) -> torch.Tensor:
        return (model(**batch[0]) if named else model(batch[0])).square().sum(1).mean()

    message = refusal(Nested(entry), [(batch,)], loss)
    assert_refused(message, f"layer '{layer}': the activations", Kind.STATISTICS)


class Packed(nn.Module):
    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.layer, self.mixes = nn.LSTM(5, 3), mixes

    def forward(self, packed: PackedSequence) -> torch.Tensor:
        if self.mixes:
            packed = packed._replace(data=packed.data - packed.data.mean(0))
        return self.layer(packed)[1][0][0]


@pytest.mark.parametrize("lengths", [(4, 3, 2), (2, 4, 3, 1), (3, 3, 3)])
def test_packed_sequences(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    packed = pack_sequence([normal(n, 5, seed=n) for n in lengths], enforce_sorted=False)
    message = refusal(Packed(mixes=True), [(packed,)])
    assert_refused(message, "layer 'layer': the activations", Kind.STATISTICS)
    assert refusal(Packed(mixes=False), [(packed,)]) is None
