"""Layers whose weight is computed by torch's parametrizations keep their own rules."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from dpkernels import PrivacyEngine
from dpkernels.engine.capture.computed_weight import ComputedWeightForward
from tests.engine.support import squared_loss, values
from tests.engine.truth import assert_private


class Centred(nn.Module):
    def forward(self, weight):
        return weight - weight.mean(dim=tuple(range(1, weight.ndim)), keepdim=True)


class Scaled(nn.Module):
    """Standardises, then scales by a gain that is trained too."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def forward(self, weight):
        axes = tuple(range(1, weight.ndim))
        deviation = weight.std(dim=axes, keepdim=True)
        gain = self.gain.view(-1, *[1] * (weight.ndim - 1))
        return gain * (weight - weight.mean(dim=axes, keepdim=True)) / deviation


class Shrunk(nn.Module):
    def forward(self, bias):
        return torch.tanh(bias)


class Dropped(nn.Module):
    """Draws another mask in every call."""

    def forward(self, weight):
        return weight * (torch.rand_like(weight) < 0.5)


def computed(layer: nn.Module, name: str = "weight", how: nn.Module | None = None) -> nn.Module:
    return parametrize.register_parametrization(layer, name, how or Centred())


def twice_parametrized() -> nn.Module:
    return computed(computed(nn.Conv2d(2, 4, 3, groups=2), how=Scaled(4)), "bias", Shrunk())


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = computed(nn.Linear(4, 4), how=Scaled(4))

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def partly_frozen() -> nn.Module:
    layer = parametrizations.weight_norm(nn.Conv1d(2, 3, 2))
    layer.parametrizations.weight.original0.requires_grad_(False)
    return layer


CASES = {
    "centred-3d": (lambda: computed(nn.Conv3d(2, 3, 3, padding=1)), values(3, 2, 4, 3, 5)),
    "standardised-2d": (lambda: computed(nn.Conv2d(2, 3, 3), how=Scaled(3)), values(4, 2, 5, 5)),
    "two-tensors": (twice_parametrized, values(3, 2, 5, 4)),
    "chained": (
        lambda: computed(computed(nn.Linear(5, 3), how=Scaled(3)), how=Shrunk()),
        values(4, 5),
    ),
    "transposed": (lambda: computed(nn.ConvTranspose2d(3, 2, 2, 2)), values(3, 3, 3, 3)),
    "weight-norm": (lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), values(4, 2, 6)),
    "partly-frozen": (partly_frozen, values(4, 2, 6)),
    "group-norm": (lambda: computed(nn.GroupNorm(2, 4), how=Shrunk()), values(3, 4, 5)),
    "reused": (Reused, values(4, 3, 4)),
    "deep": (
        lambda: nn.Sequential(
            computed(nn.Conv2d(2, 4, 3), how=Scaled(4)),
            nn.GroupNorm(2, 4),
            nn.Mish(),
            computed(nn.Conv2d(4, 2, 3)),
        ),
        values(3, 2, 7, 7),
    ),
}


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_microbatching(name, views):
    torch.manual_seed(0)
    build, x = CASES[name]
    if len(x) % views:
        x = torch.cat([x, x[:1]])
    assert_private(build().double(), squared_loss, (x,), views_per_sample=views)


def private(layer: nn.Module, **arguments):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    data = torch.utils.data.DataLoader(torch.zeros(4, 4), batch_size=4)
    engine = PrivacyEngine()
    model, optimizer, _ = engine.make_private(
        module=layer,
        optimizer=optimizer,
        data_loader=data,
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        **arguments,
    )
    return engine, model, optimizer


def test_the_rule_serves_the_layer_and_the_budget_is_kept():
    """Without memory for stored gradients the norms are formed and forgotten."""
    layer = computed(nn.Linear(4, 3))
    engine, model, optimizer = private(nn.Sequential(layer), memory_budget=0)
    assert isinstance(layer.__dict__["forward"], ComputedWeightForward)
    model(torch.randn(4, 7, 4)).square().sum().backward()
    rows = {row["parameter"]: row["strategy"] for row in engine.explain().rows}
    assert rows["0.parametrizations.weight.original"] == "recompute"
    gradient = layer.parametrizations.weight.original.grad
    assert float(gradient.sum(1).abs().max()) < 1e-6 < float(gradient.abs().max())


def test_a_random_parametrization_is_drawn_once_per_call():
    """The gradient is zero exactly where the weight of that very forward pass was dropped."""
    torch.manual_seed(0)
    layer = computed(nn.Linear(4, 3, bias=False), how=Dropped())
    _, model, _ = private(layer)
    x = torch.eye(4)
    output = model(x)
    output.sum().backward()
    dropped = output.detach().T == 0
    gradient = layer.parametrizations.weight.original.grad
    assert dropped.any()
    torch.testing.assert_close(gradient != 0, ~dropped)


def test_a_parametrization_that_uses_a_parameter_of_others_is_refused():
    class Borrowing(nn.Module):
        def __init__(self, other: nn.Parameter) -> None:
            super().__init__()
            self.borrowed = [other]

        def forward(self, weight):
            return weight * self.borrowed[0]

    model = nn.Sequential(nn.PReLU(), nn.Linear(4, 3))
    computed(model[1], how=Borrowing(model[0].weight))
    _, private_model, _ = private(model)
    with pytest.raises(ValueError, match="uses a trained parameter that it does not own"):
        private_model(torch.randn(4, 4))
