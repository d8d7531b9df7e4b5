"""Linear layers, with any number of axes between the first and the last."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dpkernels.layers import find_rule
from dpkernels.layers.linear import LinearRule, TransposedLinearRule
from dpkernels.testing import assert_per_sample
from tests.engine.support import values

CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "2d": (lambda: nn.Linear(7, 3), values(4, 7)),
    "3d": (lambda: nn.Linear(7, 3, bias=False), values(4, 5, 7)),
    "4d": (lambda: nn.Linear(7, 3), values(4, 2, 3, 7)),
    "5d": (lambda: nn.Linear(2, 1), values(4, 2, 1, 3, 2)),
    "long": (lambda: nn.Linear(3, 2), values(4, 300, 3)),
    "transposed": (
        lambda: pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 7),
        values(4, 5, 7),
    ),
    "one-sample": (lambda: nn.Linear(7, 3), values(1, 5, 7)),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_one_sample_at_a_time(name: str) -> None:
    torch.manual_seed(0)
    build, x = CASES[name]
    assert_per_sample(build(), None, (x,))


def test_each_layer_is_served_by_its_rule() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    assert type(find_rule(nn.Linear(2, 3))) is LinearRule
    assert type(find_rule(conv1d(3, 2))) is TransposedLinearRule
