"""``nn.EmbeddingBag`` by its own rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dpkernels.layers import find_rule
from dpkernels.layers.embedding_bag import EmbeddingBagRule
from dpkernels.testing import assert_per_sample
from tests.engine.support import Call, ids, made_private, squared_loss
from tests.engine.truth import assert_private, fused

MODES = ["sum", "mean", "max"]
#: lengths of the bags that the model cuts a row of six indices into; the rest is left out
LENGTHS = [6, 2, 0, 3]


def build(mode: str, **options: Any) -> nn.Module:
    return nn.EmbeddingBag(11, 6, mode=mode, **options)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}], ids=["all", "padded"])
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_equal_length(mode: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    x = torch.tensor([[1, 3, 3, 3], [2, 3, 4, 4], [3, 3, 3, 3], [5, 5, 3, 1]])
    assert_per_sample(build(mode, **options), None, (x,))


def flat(last: bool, weighted: bool) -> Callable[..., torch.Tensor]:
    """Calls a bag with the first indices of each row, as many as its last column says."""

    def call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        lengths = x[:, -1].long()
        held = torch.arange(x.shape[1] - 1) < lengths[:, None]
        indices = x[:, :-1].long()[held]
        ends = lengths.cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends if last else ends[:-1]])
        weights = indices.to(module.weight.dtype).cos() if weighted else None
        return module(indices, offsets, weights)

    return call


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"include_last_offset": True}])
@pytest.mark.parametrize("mode", [*MODES, "weighted"])
def test_flat_with_offsets(mode: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    weighted = mode == "weighted"
    module = build("sum" if weighted else mode, **options)
    x = torch.cat([ids(4, 6), torch.tensor(LENGTHS)[:, None]], 1).double()
    model = Call(module, flat("include_last_offset" in options, weighted)).double()
    assert_private(model, squared_loss, (x,))
    captured = made_private(Call(module.double(), model.call), x)[1]
    torch.testing.assert_close(captured(x), model(x))


def test_weights_of_positions_receive_their_gradient() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scorer, self.bag = nn.Embedding(11, 1), build("sum")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bag(x, per_sample_weights=self.scorer(x).squeeze(-1))

    torch.manual_seed(0)
    assert_private(Weighted().double(), squared_loss, (ids(4, 5),))


def test_flat_indices_as_the_models_input_are_refused() -> None:
    """The first axis of the model's input has indices, not samples."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = build("mean"), nn.Linear(6, 2)

        def forward(self, text: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            return self.head(self.bag(text, offsets))

    model = made_private(Text(), ids(4))[1]
    for offsets in ([0, 3, 9], [0, 1, 1, 1, 2, 2, 2, 2]):
        text = ids(2 if len(offsets) == 8 else 12)
        with pytest.raises(ValueError, match="samples"):
            model(text, torch.tensor(offsets))


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_tables_that_follow_the_batch_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"EmbeddingBag.*{next(iter(options))}"):
        made_private(build("sum", **options), ids(4, 3))


def test_a_bag_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpkernels.layers.embedding_bag._reduced", lambda v, *_: v.sum(1) * 1.01)
    expected = build("sum").double()
    with pytest.raises(AssertionError):
        assert_private(expected, squared_loss, (ids(4, 5),))
    assert fused(expected, squared_loss, (ids(4, 5),), 1.0).norms.shape == (4,)


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (nn.EmbeddingBag(5, 2), EmbeddingBagRule),
    ],
)
def test_each_layer_is_served_by_its_rule(layer: nn.Module, rule: type) -> None:
    assert type(find_rule(layer)) is rule
