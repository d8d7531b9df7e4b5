"""Rules of one's own: registered, found before the package's own, and taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpkernels.engine.module import FusedGradSampleModule
from dpkernels.layers import find_rule, register_rule
from dpkernels.layers.composite import CompositeRule, Part, Recorder, linear
from dpkernels.layers.linear import LinearRule
from dpkernels.layers.recurrent import RecurrentRule
from dpkernels.testing import assert_per_sample
from tests.engine.support import values


class Doubled(nn.Linear):
    """A layer of one's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(2 * x, self.weight, self.bias)


class DoubledRule(LinearRule):
    handles = (Doubled,)

    def forward(self, module: nn.Module, input: torch.Tensor, run: Any) -> Any:
        return run(), (2 * input,)


class DoubledInParts(CompositeRule):
    handles = (Doubled,)

    def knows(self, module: Any) -> bool:
        return True

    def rows(self, module: Any, arguments: dict[str, Any]) -> int:
        return len(arguments["x"])

    def run(self, module: Any, arguments: dict[str, Any], recorder: Recorder) -> torch.Tensor:
        return linear(recorder, 2 * arguments["x"], Part(module.weight), Part(module.bias), 0)


@pytest.mark.parametrize("rule", [DoubledRule(), DoubledInParts()])
def test_a_rule_of_ones_own(rule: Any) -> None:
    torch.manual_seed(0)
    layer = Doubled(4, 3)
    assert find_rule(layer) is None
    with register_rule(rule):
        assert find_rule(layer) is rule
        assert_per_sample(layer, None, (values(4, 2, 4),))
    assert find_rule(layer) is None


def test_a_handle_takes_its_own_rule_back_and_no_other() -> None:
    first, second = DoubledRule(), DoubledInParts()
    handles = [register_rule(rule) for rule in (first, second, first)]
    try:
        assert find_rule(Doubled(4, 3)) is first
        handles[2].remove()
        assert find_rule(Doubled(4, 3)) is second, "the newest rule comes first"
        handles[1].remove()
        handles[1].remove()
        assert find_rule(Doubled(4, 3)) is first
    finally:
        for handle in handles:
            handle.remove()
    assert find_rule(Doubled(4, 3)) is None


def test_a_rule_of_ones_own_comes_before_the_packages_own() -> None:
    """Of either kind: a composite's place may be taken by a rule in one piece, and vice versa."""

    class Own(RecurrentRule):
        handles = (nn.GRU,)

    class OwnLinear(DoubledInParts):
        handles = (nn.Linear,)

    with register_rule(Own()), register_rule(OwnLinear()):
        assert type(find_rule(nn.GRU(3, 2))) is Own
        assert type(find_rule(nn.LSTM(3, 2))) is RecurrentRule
        assert type(find_rule(nn.Linear(3, 2))) is OwnLinear
    assert type(find_rule(nn.Linear(3, 2))) is LinearRule


def test_models_made_private_meanwhile_keep_the_rule() -> None:
    with register_rule(DoubledRule()):
        private = FusedGradSampleModule(Doubled(4, 3))
    assert type(private._installed[0].rule) is DoubledRule
    assert type(FusedGradSampleModule(Doubled(4, 3))._installed[0]).__name__ == "UnitForward"


@pytest.mark.parametrize("rule", [DoubledRule, DoubledInParts, nn.Linear(2, 2), None])
def test_what_is_no_rule_is_refused(rule: Any) -> None:
    with pytest.raises(ValueError, match=r"rule=.*expected an instance of .*Rule"):
        register_rule(rule)


class FormerRule(LinearRule):
    """As rules were written when `operands` took five arguments."""

    def operands(self, module: Any, activations: Any, backprops: Any, samples: int, wanted: Any):
        return ()


def test_a_rule_with_the_former_operands_is_refused_with_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"FormerRule.*operands\(call\) of one argument"):
        register_rule(FormerRule())


class RuleWithAnOption(LinearRule):
    def operands(self, call: Any, option: bool = True):
        return super().operands(call)


def test_operands_may_take_more_where_one_argument_is_enough() -> None:
    with register_rule(RuleWithAnOption()):
        assert type(find_rule(nn.Linear(3, 2))) is RuleWithAnOption
