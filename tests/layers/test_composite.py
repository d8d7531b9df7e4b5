"""What composite rules are made of: when one holds, parts of packed parameters, a projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from dpkernels.layers import register_rule
from dpkernels.layers.composite import CompositeRule, Part, Recorder, linear
from dpkernels.layers.operands import PieceOperand, StoredOperand
from dpkernels.testing import assert_per_sample
from tests.engine.support import values


class Packed(nn.Module):
    """Two projections whose weights, and whose biases, are packed into one parameter each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = F.linear(x, self.weight, self.bias).split([3, 2], -1)
        return value * gate.sum(-1, keepdim=True).sigmoid()


class PackedRule(CompositeRule):
    handles = (Packed,)
    #: rows of each projection
    sizes = (3, 2)

    def knows(self, module: Any) -> bool:
        return set(module._parameters) == {"weight", "bias"}

    def rows(self, module: Any, arguments: dict[str, Any]) -> int:
        return len(arguments["x"])

    def run(self, module: Any, arguments: dict[str, Any], recorder: Recorder) -> torch.Tensor:
        recorder.saw(arguments["x"])
        (first, second), x = self.sizes, arguments["x"]
        whole = module.weight, module.bias
        value = linear(recorder, x, *(Part(p, 0, first) for p in whole), axis=0)
        gate = linear(recorder, x, *(Part(p, first, second) for p in whole), axis=0)
        return value * gate.sum(-1, keepdim=True).sigmoid()


def test_packed_projections_are_equal_to_one_sample_at_a_time() -> None:
    torch.manual_seed(0)
    with register_rule(PackedRule()):
        assert_per_sample(Packed(), None, (values(5, 3, 4),))


def test_a_part_is_rows_of_its_parameter_out_of_autograd() -> None:
    parameter, gradients = nn.Parameter(torch.arange(12.0).view(6, 2)), torch.ones(2, 3, 2)
    part = Part(parameter, 2, 3)
    assert torch.equal(part.value(), parameter[2:5])
    assert not part.value().requires_grad
    owner, operand = part.found(StoredOperand(gradients))
    assert owner is parameter
    assert isinstance(operand, PieceOperand)
    assert torch.equal(operand.grad_sample()[:, 2:5], gradients)
    assert operand.grad_sample().shape == (2, 6, 2)
    assert float(operand.grad_sample().sum()) == gradients.numel()


def test_a_whole_parameter_needs_no_piece() -> None:
    parameter, operand = nn.Parameter(torch.zeros(6, 2)), StoredOperand(torch.ones(2, 6, 2))
    assert Part(parameter).found(operand) == (parameter, operand)
    assert Part(parameter, 0, 6).found(operand)[1] is operand


def test_a_rule_holds_for_its_classs_own_forward_and_plain_parameters_only() -> None:
    class Other(Packed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Same(Packed):
        pass

    rule, patched, computed, more = PackedRule(), Packed(), Packed(), Packed()
    patched.forward = lambda x: x
    parametrizations.weight_norm(computed, "weight")
    more.register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert rule.applies(Packed())
    assert rule.applies(Same())
    assert not any(rule.applies(m) for m in (Other(), patched, computed, more, nn.Linear(4, 5)))
