"""One small model for each kind of layer, in sizes that no tile divides."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.engine.device.support import Build
from tests.engine.support import Call, Tokens, hidden, ids, values


class Positions(nn.Module):
    """Token and position embeddings; position ids have batch size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 20, padding_idx=0)
        self.positions = nn.Embedding(9, 20)
        self.head = nn.Linear(20, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        return self.head(torch.tanh(self.tokens(ids) + self.positions(positions)))


class Tied(nn.Module):
    """Input and output embedding share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 20)
        self.head = nn.Linear(20, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.tokens(ids).tanh())


class Quadratic(nn.Module):
    """A layer without a rule: captured sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Parameter(torch.randn(18, 18) / 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin((x @ self.form) * x)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(9, 9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.form(x, x.flip(1))


def whole_bags(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Flat indices with offsets: every row is a bag."""
    return module(x.flatten(), torch.arange(len(x), device=x.device) * x.shape[1])


def attended(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x, x, x, need_weights=False)[0]


def attention(**options: Any) -> nn.Module:
    return Call(nn.MultiheadAttention(20, 2, batch_first=True, **options), attended)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(20, 2, 36, dropout=0.0, batch_first=True)


def recurrent(kind: type[nn.RNNBase], **options: Any) -> nn.Module:
    return Call(kind(9, 18, batch_first=True, **options), hidden)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Strides with the channels innermost, of images or volumes."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim])


#: by kind: how the model is built, and its batch in float64 or int64
KINDS: dict[str, tuple[Build, torch.Tensor]] = {
    "linear": (lambda: nn.Linear(33, 20), values(5, 33)),
    "linear-short": (lambda: nn.Linear(40, 36), values(4, 5, 40)),
    "linear-long": (lambda: nn.Linear(18, 5), values(4, 70, 18)),
    "conv1d": (lambda: nn.Conv1d(3, 18, 5, stride=2, padding=2), values(4, 3, 33)),
    "conv2d": (lambda: nn.Conv2d(3, 20, 3, padding=1), values(4, 3, 9, 11)),
    "conv2d-wide": (lambda: nn.Conv2d(40, 36, 3), values(4, 40, 5, 5)),
    "conv2d-groups": (lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), values(4, 8, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 18, 3, padding=1), values(3, 2, 5, 4, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(18, 5, 3, stride=2), values(4, 18, 9)),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(8, 12, 3, 2, 1, output_padding=1, groups=2),
        values(4, 8, 5, 4),
    ),
    "transposed3d": (lambda: nn.ConvTranspose3d(18, 3, 2, stride=2), values(3, 18, 3, 2, 4)),
    "group-norm": (lambda: nn.GroupNorm(3, 18), values(4, 18, 9, 7)),
    "layer-norm": (lambda: nn.LayerNorm(33), values(4, 6, 33)),
    "instance-norm": (lambda: nn.InstanceNorm2d(18, affine=True), values(4, 18, 9, 7)),
    "instance-norm-3d": (lambda: nn.InstanceNorm3d(5, affine=True), values(3, 5, 4, 6, 3)),
    "embedding": (Positions, ids(4, 9)),
    "tied": (Tied, ids(4, 7)),
    "bag-sum": (lambda: nn.EmbeddingBag(11, 20, mode="sum"), ids(4, 6)),
    "bag-mean-offsets": (lambda: Call(nn.EmbeddingBag(11, 20, mode="mean"), whole_bags), ids(4, 6)),
    "rnn": (lambda: recurrent(nn.RNN), values(4, 6, 9)),
    "gru": (lambda: recurrent(nn.GRU), values(4, 6, 9)),
    "lstm": (lambda: recurrent(nn.LSTM, bidirectional=True), values(4, 6, 9)),
    "attention": (attention, values(4, 7, 20)),
    "encoder": (encoder, values(4, 7, 20)),
    "bilinear": (TwoInputs, values(5, 9)),
    "prelu": (lambda: nn.PReLU(7), values(4, 7, 5)),
    "no-rule": (Quadratic, values(5, 18)),
    "class-token": (Tokens, values(4, 4, 6)),
    "weight-norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(33, 20)),
        values(5, 33),
    ),
}


def model_of(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """The model in float32 and its batch, both on the CPU and the same in every call."""
    torch.manual_seed(0)
    build, x = KINDS[kind]
    return build(), x.float() if x.is_floating_point() else x
