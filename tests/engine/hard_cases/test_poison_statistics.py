"""Statistics over the batch, and other samples' values, in a forward pass: refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dpkernels.engine.trial.findings import Kind
from tests.engine.hard_cases.refusals import Around, assert_refused, normal, refusal
from tests.engine.support import squared_loss, values
from tests.engine.truth import assert_private

Program = Callable[[torch.Tensor], torch.Tensor]


def quarters_centred(h: torch.Tensor) -> torch.Tensor:
    parts = h.unflatten(0, (4, -1)) if len(h) % 4 == 0 else h[None]
    return (parts - parts.mean(1, keepdim=True)).flatten(0, 1)


def shuffled_mix(h: torch.Tensor) -> torch.Tensor:
    return 0.7 * h + 0.3 * h[torch.randperm(len(h))]


def nearest_other(h: torch.Tensor) -> torch.Tensor:
    distances = torch.cdist(h, h).fill_diagonal_(torch.inf)
    return h + h[distances.argmin(1)]


def three_nearest(h: torch.Tensor) -> torch.Tensor:
    near = torch.cdist(h, h).topk(min(3, len(h)), largest=False).indices
    return h + h[near].mean(1)


def most_extreme(h: torch.Tensor) -> torch.Tensor:
    return torch.cat([h[:, :2], h[h.norm(dim=1).argmax()].expand(len(h), -1)[:, 2:]], 1)


def contrast(h: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(h)
    return h * (unit @ unit.T).logsumexp(1, keepdim=True)


def attention_over_samples(h: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(h[None], h[None], h[None])[0]


def routed_by_capacity(h: torch.Tensor) -> torch.Tensor:
    """An expert takes the half of the batch that scores highest."""
    taken = torch.zeros(len(h), 1)
    taken[h[:, 0].topk(max(1, len(h) // 2)).indices] = 1.0
    return h * (1 + taken)


STATISTICS: dict[str, Program] = {
    "max": lambda h: h / h.abs().max(),
    "max_of_axis": lambda h: h / h.abs().amax(0),
    "mean": lambda h: h - h.mean(0),
    "std": lambda h: h / h.std(0),
    "median": lambda h: h - h.median(0).values,
    "quantile": lambda h: h - h.quantile(0.9, dim=0),
    "sum": lambda h: h / h.square().sum().sqrt(),
    "detached_mean": lambda h: h - h.detach().mean(0),
    "batch_norm": lambda h: F.batch_norm(h, None, None, training=True),
    "softmax": lambda h: h.softmax(0) * len(h),
    "sort": lambda h: h.sort(0).values,
    "cumsum": lambda h: h.cumsum(0),
    "cummax": lambda h: h.cummax(0).values,
    "roll": lambda h: h.roll(1, 0),
    "flip": lambda h: h.flip(0),
    "quarters": quarters_centred,
    "mixup": shuffled_mix,
    "nearest": nearest_other,
    "three_nearest": three_nearest,
    "most_extreme": most_extreme,
    "contrast": contrast,
    "attention": attention_over_samples,
    "capacity": routed_by_capacity,
    "first_as_context": lambda h: h + h[:1],
    "difference": lambda h: torch.cat([h[:1], h[1:] - h[:-1]]),
    "interpolated": lambda h: F.interpolate(h.T[None], len(h) - 1)[0].T[[*range(len(h) - 1), -1]],
    "convolved": lambda h: F.avg_pool1d(h.T[None], 3, 1, 1)[0].T,
    "count": lambda h: h * (h[:, :1] > 0).sum(),
    "any": lambda h: h * (1 + (h > 100.0).any(0)),
    "rank": lambda h: h + h[:, :1].argsort(0).argsort(0) / len(h),
    "gram": lambda h: h @ (h.T @ h),
    "fft": lambda h: torch.fft.fft(h, dim=0).real / len(h),
}


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("samples", [3, 7])
def test_statistics_are_refused(name: str, samples: int) -> None:
    torch.manual_seed(0)
    batches = [(normal(samples, 5, seed=seed),) for seed in range(4)]
    message = refusal(Around(STATISTICS[name]), batches, trial="every")
    assert_refused(message, "layer 'second': the activations of sample", Kind.STATISTICS)


#: in which one sample of many counts for little
LITTLE = (
    "max",
    "mean",
    "std",
    "median",
    "quantile",
    "sum",
    "batch_norm",
    "softmax",
    "count",
    "gram",
)


@pytest.mark.parametrize("name", LITTLE)
def test_statistics_of_a_large_batch_are_refused(name: str) -> None:
    torch.manual_seed(0)
    message = refusal(Around(STATISTICS[name]), [(normal(2000, 5),)])
    assert_refused(message, "layer 'second': the activations of sample", Kind.STATISTICS)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_behind_the_last_layer_are_refused(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 5)
    model.register_forward_hook(lambda module, given, output: STATISTICS[name](output))
    batches = [(normal(7, 5, seed=seed),) for seed in range(4)]
    message = refusal(model, batches, trial="every")
    assert_refused(message, "model: the values of output 0 of sample", Kind.STATISTICS)


OF_EACH: dict[str, Program] = {
    "max": lambda h: h / h.abs().amax(1, keepdim=True),
    "mean": lambda h: h - h.mean(1, keepdim=True),
    "layer_norm": lambda h: F.layer_norm(h, h.shape[1:]),
    "softmax": lambda h: h.softmax(1),
    "sort": lambda h: h.sort(1).values,
    "constant": lambda h: (h - 0.1) / 1.7,
}


@pytest.mark.parametrize("name", OF_EACH)
def test_statistics_of_each_sample_are_private(name: str) -> None:
    torch.manual_seed(0)
    assert_private(Around(OF_EACH[name]).double(), squared_loss, (values(6, 5),))


def test_a_hook_that_centres_a_layers_outputs_is_refused() -> None:
    torch.manual_seed(0)
    model = Around(torch.tanh)
    model.first.register_forward_hook(lambda module, given, output: output - output.mean(0))
    message = refusal(model, [(normal(7, 5),)])
    assert_refused(message, "layer 'second': the activations of sample", Kind.STATISTICS)


class Padding(nn.Module):
    """Sequences [B, T, 5] cut to the longest of the batch, or masked; mean over positions."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        self.layer, self.head, self.each = nn.Linear(5, 4), nn.Linear(4, 3), each

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if not self.each:
            return self.head(self.layer(x[:, : int(lengths.max())]).tanh().mean(1))
        counts = (torch.arange(x.shape[1]) < lengths[:, None])[..., None]
        return self.head((self.layer(x).tanh() * counts).sum(1) / lengths[:, None])


def test_padding_to_the_longest_sample_is_refused() -> None:
    torch.manual_seed(0)
    batches = [(normal(6, 8, 5, seed=seed), torch.tensor([2, 7, 3, 1, 4, 3])) for seed in range(4)]
    message = refusal(Padding(False), batches, trial="every")
    assert_refused(message, "model: the values of output 0 of sample", Kind.STATISTICS)
    batch = values(6, 8, 5), torch.tensor([2, 7, 3, 1, 4, 3])

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return model(*batch).square().sum(1).mean()

    assert_private(Padding(True).double(), loss, batch)


class Packing(nn.Module):
    """Runs a recurrent layer on sequences of their own lengths; mean over positions, or masked."""

    def __init__(self, masked: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)
        self.dropout, self.masked = nn.Dropout(dropout), masked

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        hidden = self.dropout(hidden)
        if not self.masked:
            return self.head(hidden.mean(1))
        counts = (torch.arange(hidden.shape[1]) < lengths[:, None])[..., None]
        return self.head((hidden * counts).sum(1) / lengths[:, None])


def test_a_mean_over_padding_behind_a_packed_layer_is_refused() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([2, 6, 3, 1, 4, 3, 2])
    batches = [(normal(7, 6, 5, seed=seed), lengths) for seed in range(4)]
    message = refusal(Packing(masked=False), batches)
    assert_refused(message, "model: the values of output 0 of sample", Kind.STATISTICS)
    for dropout in (0.0, 0.3):
        assert refusal(Packing(True, dropout), batches, trial="every") is None


class Bags(nn.Module):
    """A model of integers alone, which no NaN enters."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.bag, self.program, self.head = nn.EmbeddingBag(11, 5), program, nn.Linear(5, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.program(self.bag(tokens)))


@pytest.mark.parametrize("name", sorted(STATISTICS.keys() - {"any"}))
def test_models_of_integers_are_refused(name: str) -> None:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    batches = [(torch.randint(0, 11, (7, 6), generator=draw),) for _ in range(6)]
    message = refusal(Bags(STATISTICS[name]), batches, trial="every")
    assert_refused(message, "layer 'head': the activations of sample", Kind.STATISTICS)


class Frequencies(nn.Module):
    """Weighs tokens by how rare they are in the batch, or in public text."""

    def __init__(self, public: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 5), nn.Linear(5, 3)
        self.public = torch.arange(1.0, 12.0) if public else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        counts = self.public
        if counts is None:
            counts = torch.bincount(tokens.flatten(), minlength=11)
        weights = (1 / counts[tokens].to(self.head.weight))[..., None]
        return self.head((self.table(tokens) * weights).sum(1))


@pytest.mark.parametrize("samples", [3, 64, 2000])
def test_token_frequencies_of_the_batch_are_refused(samples: int) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (samples, 6), generator=torch.Generator().manual_seed(0))
    message = refusal(Frequencies(public=False), [(tokens,)])
    assert_refused(message, "layer 'head': the activations of sample", Kind.STATISTICS)
    if samples == 3:
        assert_private(Frequencies(public=True).double(), squared_loss, (tokens,))
