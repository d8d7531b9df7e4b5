"""Where the arguments of attention, recurrent layers and bags carry the samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dpkernels.layers.sequence import sample_axes, stated_axis


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "build",
    [
        lambda first: nn.MultiheadAttention(4, 2, batch_first=first),
        lambda first: nn.LSTM(4, 2, batch_first=first),
        lambda first: nn.TransformerEncoderLayer(4, 2, 8, batch_first=first),
        lambda first: nn.TransformerDecoderLayer(4, 2, 8, batch_first=first),
        lambda first: nn.Transformer(4, 2, 1, 1, 8, batch_first=first),
    ],
)
def test_modules_state_their_sample_axis(build: Any, batch_first: bool) -> None:
    assert stated_axis(build(batch_first)) == (0 if batch_first else 1)
    assert stated_axis(nn.Linear(4, 2)) is None


def axes_of(module: nn.Module, axis: int, *args: Any, **kwargs: Any) -> dict[str, int | None]:
    found = sample_axes(module, args, kwargs, axis)
    assert found is not None
    named, axis_of = found
    return {n: axis_of(n, t) for n, t in named.items() if isinstance(t, torch.Tensor)}


def test_axes_of_each_argument() -> None:
    x, mask = torch.zeros(3, 5, 4), torch.zeros(5, 5)
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    found = axes_of(attention, 1, x, x, value=x, key_padding_mask=x[..., 0], attn_mask=mask)
    expected = {"query": 1, "key": 1, "value": 1, "key_padding_mask": 0, "attn_mask": None}
    assert found == expected
    per_head = axes_of(attention, 1, x, x, x, attn_mask=mask.expand(6, 5, 5))
    assert per_head["attn_mask"] == 0
    assert axes_of(nn.RNN(4, 2), 0, x, x) == {"input": 0, "hx": 1}
    assert axes_of(nn.EmbeddingBag(4, 2), 0, x[..., 0].long()) == {"input": 0}


def test_arguments_without_a_sample_axis_are_refused() -> None:
    flat = torch.zeros(5, 4)
    for module, arguments in [
        (nn.MultiheadAttention(4, 2), (flat, flat, flat)),
        (nn.RNN(4, 2), (flat,)),
        (nn.EmbeddingBag(4, 2), (flat[:, 0].long(), torch.tensor([0, 2]))),
    ]:
        with pytest.raises(ValueError, match="sample axis|different lengths"):
            axes_of(module, 0, *arguments)


def test_other_modules_and_other_forwards_are_left_alone() -> None:
    class Own(nn.RNN):
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    x = torch.zeros(3, 5, 4)
    assert sample_axes(nn.Linear(4, 2), (x,), {}, 0) is None
    assert sample_axes(Own(4, 2), (x,), {}, 0) is None
