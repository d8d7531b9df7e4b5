"""Backward passes that couple samples where the forward pass does not: refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dpkernels.engine.trial.findings import Kind
from tests.engine.hard_cases.refusals import Around, assert_refused, normal, refusal
from tests.engine.support import squared_loss, values
from tests.engine.truth import assert_private

Gradient = Callable[[torch.Tensor], torch.Tensor]

COUPLED: dict[str, Gradient] = {
    "clipped": lambda g: g * (0.1 / g.norm()).clamp(max=1.0),
    "scaled": lambda g: g / g.abs().max(),
    "centred": lambda g: g - g.mean(0),
    "normalised": lambda g: g / g.std(0),
    "by_value": lambda g: g.clamp(max=g.mean()),
    "ranked": lambda g: g * (g.norm(dim=1) > g.norm(dim=1).median())[:, None],
    "shared": lambda g: g.mean(0).expand_as(g),
    "shuffled": lambda g: g.flip(0),
    "emptied": lambda g: g.nan_to_num() if bool(g.isfinite().all()) else torch.zeros_like(g),
    "guarded": lambda g: g * (g.abs().max() < 30.0),
}


class Passing(torch.autograd.Function):
    """Nothing in the forward pass; `change` of the gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, change: Gradient) -> torch.Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.change(grad), None


def passing(change: Gradient) -> Gradient:
    return lambda h: Passing.apply(h, change)


def hooked(change: Gradient) -> Gradient:
    def program(h: torch.Tensor) -> torch.Tensor:
        if h.requires_grad:
            h.register_hook(change)
        return h

    return program


@pytest.mark.parametrize("put", [passing, hooked])
@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("samples", [3, 64])
def test_gradients_that_couple_samples_are_refused(
    name: str, put: Callable[[Gradient], Gradient], samples: int
) -> None:
    torch.manual_seed(0)
    batches = [(normal(samples, 5, seed=seed),) for seed in range(4)]
    message = refusal(Around(put(COUPLED[name])), batches, trial="every")
    assert_refused(message, "layer 'first': the backprops of sample", Kind.BACKWARD)


@pytest.mark.parametrize("name", sorted(COUPLED.keys() - {"guarded"}))
def test_gradients_of_a_large_batch_are_refused(name: str) -> None:
    torch.manual_seed(0)
    message = refusal(Around(passing(COUPLED[name])), [(normal(2000, 5),)])
    assert_refused(message, "layer 'first': the backprops of sample", Kind.BACKWARD)


@pytest.mark.parametrize("name", sorted(COUPLED.keys() - {"guarded"}))
def test_full_backward_hooks_of_modules_are_refused(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[1].register_full_backward_hook(lambda module, given, got: (COUPLED[name](given[0]),))
    batches = [(normal(7, 5, seed=seed),) for seed in range(4)]
    message = refusal(model, batches, trial="every")
    assert_refused(message, "layer '0': the backprops of sample", Kind.BACKWARD)


OF_EACH: dict[str, Gradient] = {
    "clipped": lambda g: g * (0.1 / g.flatten(1).norm(dim=1, keepdim=True)).clamp(max=1.0),
    "centred": lambda g: g - g.mean(1, keepdim=True),
    "by_value": lambda g: g.clamp(-0.1, 0.1),
    "dropped": lambda g: g,
}


@pytest.mark.parametrize("put", [passing, hooked])
@pytest.mark.parametrize("name", OF_EACH)
def test_gradients_of_each_sample_by_itself_are_refused_never(
    name: str, put: Callable[[Gradient], Gradient]
) -> None:
    """Clipping by sample depends on the loss' scale, as a mean over B rows has it: so no truth."""
    torch.manual_seed(0)
    batches = [(normal(7, 5, seed=seed),) for seed in range(4)]
    assert refusal(Around(put(OF_EACH[name])), batches, trial="every") is None
    if name in ("centred", "dropped"):
        assert_private(Around(put(OF_EACH[name])).double(), squared_loss, (values(6, 5),))


class Prototypes(nn.Module):
    """A layer without a rule, whose own batch statistics only its gradient sees."""

    def __init__(self, change: Gradient | None) -> None:
        super().__init__()
        self.table, self.change = nn.Parameter(normal(4, 5)), change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        near = torch.cdist(x, self.table)
        return near if self.change is None else Passing.apply(near, self.change)


@pytest.mark.parametrize("name", sorted(COUPLED.keys() - {"guarded"}))
def test_layers_without_a_rule(name: str) -> None:
    torch.manual_seed(0)
    change = COUPLED[name]
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), Prototypes(change), nn.Linear(4, 3))
    batches = [(normal(7, 5, seed=seed),) for seed in range(4)]
    message = refusal(model, batches, trial="every")
    assert message is None or message.startswith("module '2' (Prototypes)"), message


def test_a_layer_without_a_rule_is_private() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), Prototypes(None), nn.Linear(4, 3))
    assert_private(model.double(), squared_loss, (values(6, 5),))


class Scaled(nn.Module):
    """A bare parameter beside layers; its gradient is made for each sample, or coupled."""

    def __init__(self, change: Gradient) -> None:
        super().__init__()
        self.scale, self.change = nn.Parameter(torch.ones(5)), change
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(Passing.apply(self.scale * x, self.change))


@pytest.mark.parametrize("name", sorted(COUPLED.keys() - {"guarded"}))
def test_bare_parameters_are_refused(name: str) -> None:
    torch.manual_seed(0)
    batches = [(normal(7, 5, seed=seed),) for seed in range(4)]
    message = refusal(Scaled(COUPLED[name]), batches, trial="every")
    assert_refused(message, "model: the gradients of 'scale' of sample", Kind.BACKWARD)


def test_a_bare_parameter_is_private() -> None:
    torch.manual_seed(0)
    assert_private(Scaled(lambda g: g).double(), squared_loss, (values(6, 5),))
