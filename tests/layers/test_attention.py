"""``nn.MultiheadAttention`` by its own rule: every option against one sample at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dpkernels.engine.capture.layer_in_parts import PartsForward
from dpkernels.engine.module import FusedGradSampleModule
from dpkernels.layers import find_rule
from dpkernels.layers.attention import AttentionRule
from dpkernels.testing import assert_per_sample
from tests.engine.support import Call, made_private, squared_loss, values
from tests.engine.truth import assert_private


def mask(x: torch.Tensor, boolean: bool = True) -> torch.Tensor:
    above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return above if boolean else torch.zeros(above.shape, dtype=x.dtype).masked_fill(above, -3.0)


def padding(x: torch.Tensor) -> torch.Tensor:
    return (x[..., 0] > x[:, :1, 0]) & (torch.arange(x.shape[1]) > 0)


def per_head(x: torch.Tensor) -> torch.Tensor:
    """A mask of its own for every sample and head, [B * heads, T, T]."""
    own = x[:, None, :, :1] + x[:, None, :, :1].transpose(2, 3)
    return own.expand(-1, 2, -1, -1).flatten(0, 1)


#: by name: how the module is called on [B, T, 8]; query, key, value and keyword arguments
CALLS: dict[str, Callable[[torch.Tensor], tuple[Any, ...]]] = {
    "plain": lambda x: (x, x, x, {}),
    "no-weights": lambda x: (x, x, x, {"need_weights": False}),
    "causal-hint": lambda x: (
        x, x, x, {"attn_mask": mask(x), "is_causal": True, "need_weights": False},
    ),
    "causal-hint-with-padding": lambda x: (
        x, x, x, {"attn_mask": mask(x), "is_causal": True, "key_padding_mask": padding(x)},
    ),
    "float-mask": lambda x: (x, x, x, {"attn_mask": mask(x, False)}),
    "padding": lambda x: (x, x, x, {"key_padding_mask": padding(x), "need_weights": False}),
    "mask-per-head": lambda x: (x, x, x, {"attn_mask": per_head(x)}),
    "mask-per-head-and-padding": lambda x: (
        x, x, x, {"attn_mask": per_head(x), "key_padding_mask": padding(x), "need_weights": False},
    ),
    "cross": lambda x: (x, (y := x[:, :2].tanh()), y, {}),
    "three": lambda x: (x, x.tanh(), x.flip(1), {"need_weights": False}),
    "weights-of-all-heads": lambda x: (x, x, x, {"average_attn_weights": False}),
}  # fmt: skip
BUILDS: dict[str, dict[str, Any]] = {
    "first-axis": {"batch_first": True},
    "second-axis": {},
    "no-bias": {"batch_first": True, "bias": False},
}


def attend(name: str) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """Call by `name` on [B, T, 8], both outputs as [B, F]."""

    def call(module: Any, x: torch.Tensor) -> torch.Tensor:
        *tensors, options = CALLS[name](x)
        if not module.batch_first:
            turned = {id(t): t.transpose(0, 1) for t in tensors}
            tensors = [turned[id(t)] for t in tensors]
        output, weights = module(*tensors, **options)
        output = output if module.batch_first else output.transpose(0, 1)
        found = [output.flatten(1)] + ([] if weights is None else [weights.flatten(1)])
        return torch.cat(found, 1)

    return call


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", CALLS)
def test_equal_to_one_sample_at_a_time(name: str, build: str) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **BUILDS[build])
    plain = copy.deepcopy(module).double()
    x = values(4, 3, 8)
    assert_private(Call(module, attend(name)).double(), squared_loss, (x,))
    captured = made_private(Call(copy.deepcopy(plain), attend(name)), x)[1]
    torch.testing.assert_close(captured(x), Call(plain, attend(name))(x))


@pytest.mark.parametrize("batch_first", [True, False])
def test_variations(batch_first: bool) -> None:
    torch.manual_seed(0)
    x = values(4, 3, 8)
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    assert_per_sample(module, None, (x, x.cos(), x.sin()), batch_first=batch_first)


def test_keys_and_values_of_other_widths() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, kdim=3, vdim=5, batch_first=True)
    model = Call(module, lambda m, x: m(x, x[..., :3], x[..., 3:])[0])
    assert_private(model.double(), squared_loss, (values(4, 3, 8),))


def test_views_and_frozen_projections() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    module.in_proj_bias.requires_grad_(False)
    module.out_proj.weight.requires_grad_(False)
    assert_private(
        Call(module, attend("three")).double(), squared_loss, (values(6, 3, 8),), views_per_sample=2
    )


def test_dropout_of_weights_is_drawn() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    x = values(4, 30, 8).float()
    _, model, _, _ = made_private(Call(module, lambda m, x: m(x, x, x)[1]), x)
    share = float((model(x) == 0).float().mean())
    assert 0.15 < share < 0.35, "both heads of a weight are dropped in a quarter of the cases"


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_options_without_a_rule_run_sample_by_sample(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    assert_private(Call(module, attend("plain")).double(), squared_loss, (values(4, 3, 8),))


def test_transformer_layers_run_by_rules() -> None:
    """Nothing in an encoder or decoder layer is left to the fallback."""
    layers = nn.ModuleList([
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
    ])  # fmt: skip
    installed = FusedGradSampleModule(layers)._installed[:-1]
    kinds = {type(f).__name__ for f in installed}
    assert kinds == {"PartsForward", "LayerForward"}
    assert sum(type(f) is PartsForward for f in installed) == 3


def test_decoder_layer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = Call(layer, lambda m, x: m(x, x[:, :2].cos(), tgt_mask=mask(x), tgt_is_causal=True))
    assert_private(model.double(), squared_loss, (values(4, 3, 8),))


def test_an_input_without_samples_is_refused() -> None:
    model = Call(nn.MultiheadAttention(8, 2), lambda m, x: m(x[0], x[0], x[0])[0])
    with pytest.raises(ValueError, match=r"'module'.*query of shape.*no sample axis"):
        made_private(model, torch.zeros(4, 3, 8))[1](torch.zeros(4, 3, 8))


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (nn.MultiheadAttention(8, 2), AttentionRule),
    ],
)
def test_each_layer_is_served_by_its_rule(layer: nn.Module, rule: type) -> None:
    assert type(find_rule(layer)) is rule
