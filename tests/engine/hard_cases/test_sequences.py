"""Attention and recurrent layers as they stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.support import (
    Call,
    hidden,
    made_private,
    squared_loss,
    values,
)
from tests.engine.truth import assert_private


def transposed(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Call a module whose sample axis is the second."""
    x = x.transpose(0, 1)
    output = module(x, x, x) if isinstance(module, nn.MultiheadAttention) else module(x)
    return (output[0] if isinstance(output, tuple) else output).transpose(0, 1)


def given(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Call with a first hidden state."""
    state = x[None, :, 0, :1].expand(1, -1, 6).contiguous()
    return module(x, (state, state) if isinstance(module, nn.LSTM) else state)[0]


@pytest.mark.parametrize("length", [4, 3], ids=["square", "oblong"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: type[nn.RNNBase], length: int) -> None:
    torch.manual_seed(0)
    x = values(4, length, 5)
    first = kind(5, 6, 2, batch_first=True, bidirectional=True)
    assert_private(Call(first, hidden).double(), squared_loss, (x,))
    assert_private(Call(kind(5, 6, batch_first=True), given).double(), squared_loss, (x,))
    assert_private(Call(kind(5, 6), transposed).double(), squared_loss, (x,))


class OwnForward(nn.LSTM):
    """Computes something of its own: the rule of its base class does not hold."""

    def forward(self, *args: Any) -> Any:
        return super().forward(*args)


def test_packed_sequences_without_a_rule_are_refused() -> None:
    def packed(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        lengths = torch.full((len(x),), x.shape[1])
        return module(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[0].data

    x = values(4, 3, 5).float()
    with pytest.raises(ValueError, match=r"'module' \(OwnForward\).*PackedSequence.*padded tensor"):
        made_private(Call(OwnForward(5, 6, batch_first=True), packed), x)[1](x)


def causal(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return module(x, x, x, attn_mask=mask, need_weights=False)[0]


def padded(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mask = (x[..., 0] > x[:, :1, 0]) & (torch.arange(x.shape[1]) > 0)
    return module(x, x, x, key_padding_mask=mask)[0]


@pytest.mark.parametrize("build", [
    lambda: Call(nn.MultiheadAttention(8, 2, batch_first=True), causal),
    lambda: Call(nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True), padded),
    lambda: Call(nn.MultiheadAttention(8, 2), transposed),
    lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    lambda: Call(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), 2,
                                       nn.LayerNorm(8), enable_nested_tensor=False), transposed),
], ids=["causal", "padded", "second-axis", "encoder-layer", "encoder-second-axis"])  # fmt: skip
def test_attention(build: Callable[[], nn.Module]) -> None:
    """As many positions as samples: nothing can be told by sizes."""
    torch.manual_seed(0)
    assert_private(build().double(), squared_loss, (values(4, 4, 8),))


def test_bilinear_and_layers_without_parameters() -> None:
    torch.manual_seed(0)
    bilinear = Call(nn.Bilinear(5, 5, 3), lambda m, x: m(x, x.tanh()))
    assert_private(bilinear.double(), squared_loss, (values(4, 3, 5),))
    local = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LocalResponseNorm(2), nn.AvgPool2d(2))
    assert_private(local.double(), squared_loss, (values(4, 2, 6, 6),))
