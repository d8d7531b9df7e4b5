"""For which modules a rule holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from dpkernels.layers import find_rule
from dpkernels.layers.composite import CompositeRule
from dpkernels.layers.rule import CapturedCall, Rule


class Renamed(nn.Linear):
    """A subclass that computes what its base class computes."""


class Overridden(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class OtherHelper(nn.Conv2d):
    """Overrides a method that ``forward`` calls."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 2 * weight, bias)


def with_parameter(module: nn.Module) -> nn.Module:
    module.scale = nn.Parameter(torch.ones(1))
    return module


def with_child(module: nn.Module) -> nn.Module:
    module.child = nn.Identity()
    return module


def with_forward(module: nn.Module) -> nn.Module:
    module.forward = lambda *args: None
    return module


HOLDS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "linear": (lambda: nn.Linear(2, 2), "LinearRule"),
    "no bias": (lambda: nn.Linear(2, 2, bias=False), "LinearRule"),
    "subclass": (lambda: Renamed(2, 2), "LinearRule"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "LinearRule"),
    "overridden forward": (lambda: Overridden(2, 2), None),
    "overridden helper": (lambda: OtherHelper(2, 2, 1), None),
    "unknown parameter": (lambda: with_parameter(nn.Linear(2, 2)), None),
    "module below": (lambda: with_child(nn.Linear(2, 2)), None),
    "forward of the instance": (lambda: with_forward(nn.Linear(2, 2)), None),
    "recurrent": (lambda: nn.GRU(2, 2), "RecurrentRule"),
    "recurrent with a forward of the instance": (lambda: with_forward(nn.GRU(2, 2)), None),
    "recurrent with an unknown parameter": (lambda: with_parameter(nn.GRU(2, 2)), None),
    "computed attention": (
        lambda: parametrizations.weight_norm(nn.MultiheadAttention(2, 1), "in_proj_weight"), None,
    ),
    "no layer": (nn.Flatten, None),
}  # fmt: skip


@pytest.mark.parametrize("name", HOLDS)
def test_which_rule_holds(name: str) -> None:
    build, expected = HOLDS[name]
    rule = find_rule(build())
    assert (None if rule is None else type(rule).__name__) == expected


def test_what_a_rule_must_say() -> None:
    call = CapturedCall(nn.Linear(1, 1), (), torch.zeros(1, 1), 1, frozenset())
    with pytest.raises(NotImplementedError):
        Rule().operands(call)
    for method in (CompositeRule().rows, lambda *a: CompositeRule().run(*a, None)):
        with pytest.raises(NotImplementedError):
            method(nn.GRU(1, 1), {})
    assert Rule().forward(nn.Linear(1, 1), torch.ones(1), lambda: torch.zeros(1)) == (
        torch.zeros(1), (torch.ones(1),)
    )  # fmt: skip
