"""Embedding tables."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dpkernels.layers import find_rule
from dpkernels.layers.embedding import EmbeddingRule
from dpkernels.testing import assert_per_sample
from tests.engine.support import ids, made_private

CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "one-index": (lambda: nn.Embedding(11, 6), ids(4)),
    "sequence": (lambda: nn.Embedding(11, 6), ids(4, 5)),
    "padded": (lambda: nn.Embedding(11, 6, padding_idx=3), ids(4, 5)),
    "matrix": (lambda: nn.Embedding(11, 6), ids(4, 2, 3)),
    "32-bit-indices": (lambda: nn.Embedding(11, 6), ids(4, 5).int()),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_one_sample_at_a_time(name: str) -> None:
    torch.manual_seed(0)
    build, x = CASES[name]
    assert_per_sample(build(), None, (x,))


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_tables_that_follow_the_batch_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"Embedding.*{next(iter(options))}"):
        made_private(nn.Embedding(11, 6, **options), ids(4, 3))


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (nn.Embedding(5, 2), EmbeddingRule),
    ],
)
def test_each_layer_is_served_by_its_rule(layer: nn.Module, rule: type) -> None:
    assert type(find_rule(layer)) is rule
