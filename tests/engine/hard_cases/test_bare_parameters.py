"""Modules that own bare parameters beside layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.engine.support import (
    Tokens,
    made_private,
    squared_loss,
    values,
)
from tests.engine.truth import assert_private, microbatching, relative_error


class Shared(nn.Module):
    """A parameter whose use does not broadcast over samples: it stays a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(5, 5))
        self.pair = nn.ParameterList([torch.randn(5), torch.randn(5)])
        self.layer = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) @ self.mixing * self.pair[0] + self.pair[1]


@pytest.mark.parametrize("views", [1, 2])
def test_bare_parameters_beside_layers(views: int) -> None:
    torch.manual_seed(0)
    assert_private(Tokens().double(), squared_loss, (values(4, 4, 6),), views_per_sample=views)


def test_layers_beside_bare_parameters_keep_their_rules() -> None:
    torch.manual_seed(0)
    engine, model, _, _ = made_private(Tokens().double(), values(4, 4, 6))
    squared_loss(model, (values(4, 4, 6),)).backward()
    strategies = {row["parameter"]: row["backend"] for row in engine.explain().rows}
    assert strategies["patch.weight"] != "autograd"
    assert strategies["token"] == "autograd"


@pytest.mark.parametrize("shape", [(4, 5), (4, 4, 5), (5, 5, 5), (2, 2, 5)])
def test_bare_parameters_that_do_not_broadcast(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert_private(Shared().double(), squared_loss, (values(*shape),))


class Scaled(nn.Module):
    """A bare parameter that broadcasts over inputs of any number of axes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.randn(5)), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * self.scale)


class Particular(Scaled):
    """Raises where its parameter has another shape than it was made with."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale.shape != (5,):
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize(
    "error", [AssertionError, TypeError, KeyError, ZeroDivisionError, AttributeError, RuntimeError]
)
def test_a_forward_that_refuses_an_expanded_parameter_is_a_unit(error: type[Exception]) -> None:
    torch.manual_seed(0)
    assert_private(Particular(error).double(), squared_loss, (values(4, 3, 5),))


class Untraceable(nn.Module):
    """A unit whose forward reads a value, which vmap refuses, and then raises an error of its own.

    A negative first value is an error in any case.
    """

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(5, 5))
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            first = x.flatten()[0].item()
        except RuntimeError as refused:
            raise self.error from refused
        if first < 0.0:
            raise OverflowError(f"first value {first}")
        return x @ self.mixing


@pytest.mark.parametrize("error", [AssertionError, TypeError, KeyError, RuntimeError])
def test_a_unit_that_raises_anything_under_vmap_runs_as_a_loop(error: type[Exception]) -> None:
    torch.manual_seed(0)
    assert_private(Untraceable(error).double(), squared_loss, (values(4, 3, 5).abs(),))


def test_an_error_of_a_units_own_is_shown() -> None:
    torch.manual_seed(0)
    x = values(4, 5).abs()
    _, model, _, _ = made_private(Untraceable(TypeError).double(), x)
    with pytest.raises(OverflowError, match="first value -"):
        model(-x)


@pytest.mark.parametrize("shapes", [((4, 7, 5), (4, 5)), ((4, 5), (4, 7, 5)), ((4, 5), (4, 4, 5))])
def test_inputs_with_another_number_of_axes_are_tried_again(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    """[samples, 1, features] fits sequences; of single vectors it would pair every two samples."""
    torch.manual_seed(0)
    model, x = Scaled().double(), values(*shapes[1])
    _, wrapped, optimizer, _ = made_private(model, values(*shapes[0]))
    squared_loss(wrapped, (values(*shapes[0]),)).backward()
    optimizer.zero_grad()
    squared_loss(wrapped, (x,)).backward()
    wrapped.to_standard_module()
    expected = microbatching(model, squared_loss, (x,), 1.0)
    for name, p in model.named_parameters():
        assert relative_error(p.grad, expected.gradients[name]) < 1e-9


class Masked(nn.Module):
    """A unit that takes a mask [T, T] beside the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(5, 5) / 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = x @ self.mixing
        return (hidden @ hidden.transpose(1, 2) + mask).softmax(-1) @ hidden


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(5, 5), Masked()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.full((x.shape[1],) * 2, -1e4, dtype=x.dtype).triu(1)
        return self.attention(self.first(x), mask)


def test_a_mask_as_long_as_the_batch_is_not_taken_for_samples() -> None:
    torch.manual_seed(0)
    model, x = Causal().double(), values(8, 6, 5)
    _, wrapped, optimizer, _ = made_private(model, x)
    for samples in (8, 6):
        optimizer.zero_grad()
        squared_loss(wrapped, (x[:samples],)).backward()
    wrapped.to_standard_module()
    expected = microbatching(model, squared_loss, (x[:6],), 1.0, expected_batch_size=8)
    for name, p in model.named_parameters():
        assert relative_error(p.grad, expected.gradients[name]) < 1e-9


class Penalised(nn.Module):
    """Returns something of its parameter alone, beside what it makes of its samples."""

    def __init__(self, penalty: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.scale, self.layer, self.penalty = (
            nn.Parameter(torch.randn(5)),
            nn.Linear(5, 3),
            penalty,
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(x * self.scale), self.penalty(self.scale)


@pytest.mark.parametrize("penalty", [lambda p: p.square().sum(), lambda p: p.square()])
def test_a_penalty_on_a_bare_parameter_is_refused(
    penalty: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Expanded, the parameter would enter it once for every sample."""
    torch.manual_seed(0)
    x = values(4, 5)
    _, model, _, _ = made_private(Penalised(penalty).double(), x)
    with pytest.raises(ValueError, match="is not what its samples give one by one"):
        model(x)


class Product(nn.Module):
    """A unit: no rule knows its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(values(5, 6))
        self.second = nn.Parameter(values(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.first) @ self.second


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unit, self.last = Product(), nn.Linear(3, 2).double()
        self.recomputes = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recomputes:
            return self.last(checkpoint(self.unit, x, use_reentrant=False))
        return self.last(self.unit(x))


def test_a_unit_inside_a_checkpoint_is_recomputed() -> None:
    """A checkpoint ends its recomputation by an exception, which is not the unit's."""
    x = values(4, 5)
    net = Checkpointed()
    _, model, optimizer, _ = made_private(net, x)
    released = []
    for net.recomputes in (False, True):
        optimizer.zero_grad()
        squared_loss(model, (x.requires_grad_(),)).backward()
        released.append([p.grad.clone() for p in net.parameters()])
    for once, again in zip(*released):
        torch.testing.assert_close(once, again)
