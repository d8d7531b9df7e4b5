"""What a backward pass may meet: unused parts, second passes, nesting, empty batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.engine.support import (
    Call,
    Tokens,
    hidden,
    made_private,
    squared_loss,
    step,
    values,
)
from tests.engine.truth import assert_private, microbatching, relative_error


def test_a_parameter_that_was_not_used_gets_noise_and_no_gradient() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "not": nn.Linear(30, 30)})
    x = values(4, 4).float()
    _, wrapped, optimizer, _ = made_private(Call(model, lambda m, x: m["used"](x)), x, noise=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        squared_loss(wrapped, (x,)).backward()
        noise = model["not"].weight.grad * 4
        assert 0.85 < float(noise.std()) < 1.15
        used = microbatching(model["used"], squared_loss, (x,), 1.0)
        torch.testing.assert_close(optimizer.last_step.per_sample_norm, used.norms)
        optimizer.step()
        model["used"].load_state_dict(model["used"].state_dict())


def test_a_second_backward_accumulates_or_is_refused() -> None:
    torch.manual_seed(0)
    x = values(4, 5).float()
    expected = microbatching(nn.Linear(5, 3), squared_loss, (x,), 1.0)
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    _, model, _, _ = made_private(layer, x, poisson_sampling=False)
    expected = microbatching(layer, squared_loss, (x,), 1.0)
    for _ in range(2):
        squared_loss(model, (x,)).backward()
    assert relative_error(layer.weight.grad, expected.gradients["weight"]) < 1e-5
    _, model, _, _ = made_private(nn.Linear(5, 3), x)
    squared_loss(model, (x,)).backward()
    with pytest.raises(ValueError, match="not compatible with grad accumulation"):
        squared_loss(model, (x,)).backward()


def test_a_training_forward_that_is_never_backpropagated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4, bias=False), nn.Linear(4, 3))
    x = values(4, 5).float()
    expected = microbatching(model, squared_loss, (x,), 1.0)
    _, wrapped, _, _ = made_private(model, x)
    wrapped(values(7, 5).float())
    squared_loss(wrapped, (x,)).backward()
    assert relative_error(model[0].weight.grad, expected.gradients["0.weight"]) < 1e-5


def test_input_gradients_pass_by_and_release_nothing() -> None:
    torch.manual_seed(0)
    x = values(4, 5).float().requires_grad_()
    _, model, optimizer, _ = made_private(
        nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), x.detach()
    )
    (saliency,) = torch.autograd.grad(model(x).sum(), x)
    assert float(saliency.abs().sum()) > 0
    assert all(p.grad is None for p in model.parameters())
    step(model, optimizer, x)


def test_second_derivatives_are_refused() -> None:
    """A gradient penalty reaches the weights around capture: by its first or second backward."""
    x = values(4, 5).float().requires_grad_()
    _, model, _, _ = made_private(
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), x.detach()
    )
    with pytest.raises(ValueError, match="create_graph"):
        squared_loss(model, (x,)).backward(create_graph=True)
    with pytest.raises(ValueError, match="create_graph"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_nested_inputs_and_outputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, batch: dict[str, object]) -> dict[str, object]:
            x, (y, scale) = batch["x"], batch["rest"]
            return {"a": self.one(x) * scale, "b": [self.two(y), None]}

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        out = model({"x": batch[0], "rest": (batch[0].tanh(), 2.0)})
        return (out["a"] + out["b"][0]).square().sum(1).mean()

    torch.manual_seed(0)
    assert_private(Nested().double(), loss, (values(4, 4),))


@dataclass
class Record:
    """An output whose tensors PyTorch does not find."""

    logits: torch.Tensor
    extra: object = None


def test_dataclasses_as_outputs() -> None:
    """They begin a pass, also ahead of a reentrant checkpoint, and empty batches pass through."""

    class Recorded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> Record:
            hidden = checkpoint(self.one, x, use_reentrant=True)
            return Record(checkpoint(self.two, hidden, use_reentrant=True), {"hidden": hidden})

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return model(batch[0].requires_grad_()).logits.square().sum(1).mean()

    torch.manual_seed(0)
    x = values(4, 4)
    model = Recorded().double()
    assert_private(model, loss, (x,))
    _, model, _, _ = made_private(model, x)
    output = model(x[:0])
    assert output.logits.shape == (0, 3)
    assert output.extra["hidden"].shape == (0, 4)


class Tenfold:
    """A forward in the place of a layer's own, as libraries patch them in."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 10 * type(self.layer).forward(self.layer, x)


def test_a_layer_whose_instance_has_a_forward_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(6, 3)).double()
    for layer in (model[0], model[2]):
        layer.forward = Tenfold(layer)
    assert_private(model, squared_loss, (values(4, 1, 5),))


class Scaled(nn.Linear):
    """A subclass that keeps the base class's forward."""

    def extra_repr(self) -> str:
        return "scaled"


def test_subclasses_of_layers_that_have_a_rule() -> None:
    torch.manual_seed(0)
    assert_private(Scaled(5, 3).double(), squared_loss, (values(4, 5),))


@pytest.mark.parametrize(("build", "shape"), [
    (lambda: nn.Conv3d(2, 3, 3), (3, 2, 5, 5, 5)),
    (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (3, 2, 3, 3, 3)),
])  # fmt: skip
def test_channels_last_3d(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = values(*shape).contiguous(memory_format=torch.channels_last_3d)
    model = build().double().to(memory_format=torch.channels_last_3d)
    assert_private(model, squared_loss, (x,))


EMPTY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3)), (2, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 3, 3)),
    "instance-norm": (lambda: nn.InstanceNorm2d(2, affine=True), (2, 4, 4)),
    "layer-norm": (lambda: nn.Sequential(nn.LayerNorm(4), nn.PReLU()), (3, 4)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (3, 8)),
    "recurrent": (lambda: Call(nn.LSTM(4, 3, batch_first=True), hidden), (3, 4)),
    "bare": (Tokens, (4, 6)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch_is_noise_alone(name: str) -> None:
    torch.manual_seed(0)
    build, shape = EMPTY[name]
    x = values(4, *shape).float()
    _, model, optimizer, _ = made_private(build(), x, noise=1.0)
    step(model, optimizer, x)
    optimizer.zero_grad()
    model(x[:0]).square().sum().backward()
    noise = torch.cat([p.grad.flatten() for p in model.parameters()]) * 4
    assert noise.isfinite().all()
    assert abs(float(noise.std()) - 1.0) < 5 / math.sqrt(2 * len(noise))
    optimizer.step()


@pytest.mark.parametrize("samples", [0, 1])
def test_a_backward_pass_is_judged_by_its_own_batch(samples: int) -> None:
    """Another forward pass in between, empty or not, does not decide whether this one is."""
    torch.manual_seed(0)
    x = values(1, 4).float() * 100
    loss = Call(nn.Linear(4, 3), lambda layer, x: layer(x).square().mean())
    _, model, _, _ = made_private(loss, x)
    own, other = model(x[:samples]), model(x[: 1 - samples])
    own.backward()
    assert other.shape == ()
    norm = torch.sqrt(sum(p.summed_grad.square().sum() for p in model.parameters()))
    assert float(norm) == pytest.approx(float(samples), abs=0.01)
