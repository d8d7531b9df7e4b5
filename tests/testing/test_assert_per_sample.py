"""The shipped proof: right layers pass, and a rule that is wrong in one way only is found."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpkernels.layers import register_rule
from dpkernels.layers.composite import CompositeRule, Part, Recorder, linear
from dpkernels.layers.linear import LinearRule
from dpkernels.layers.operands import LinearOperand, Operand, StoredOperand
from dpkernels.layers.rule import CapturedCall
from dpkernels.testing import VARIATIONS, assert_per_sample
from tests.engine.support import values


class Plain(nn.Linear):
    """A linear layer of one's own, whose rule each test makes wrong in another way."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight, self.bias)


class Right(LinearRule):
    handles = (Plain,)


def times(operand: Operand, factor: float) -> StoredOperand:
    return StoredOperand(operand.grad_sample() * factor)


class Bias(Right):
    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        for name, operand in super().operands(call):
            yield name, times(operand, 1.01) if name == "bias" else operand


@dataclass(frozen=True)
class LongNorm(LinearOperand):
    def norm_sq(self) -> torch.Tensor:
        return super().norm_sq() * 1.02


class Norm(Right):
    def product(self, x: torch.Tensor, grad: torch.Tensor) -> LinearOperand:
        return LongNorm(x, grad)


class SecondCall(Right):
    """Remembers in the rule what belongs to the call."""

    def forward(self, module: nn.Module, input: torch.Tensor, run: Any) -> Any:
        self.seen = input.detach()
        return run(), (input,)

    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        call.activations = (self.seen,)
        return super().operands(call)


class Frozen(Right):
    """Goes wrong in a branch that only a frozen weight takes."""

    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        for name, operand in super().operands(call):
            yield name, times(operand, 1.0 if "weight" in call.wanted else 2.0)


class FrozenToo(Right):
    """Hands over gradients that nobody wants."""

    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        call.wanted = frozenset({"weight", "bias"})
        return super().operands(call)


class NoBias(Right):
    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        return [found for found in super().operands(call) if found[0] != "bias"]


class Empty(Right):
    """Divides by what a blank sample has not."""

    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        if not call.activations[0].any():
            raise ZeroDivisionError("nothing but zeros")
        return super().operands(call)


class Mixed(Right):
    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        call.backprops = call.backprops - 0.1 * call.backprops.mean(0)
        return super().operands(call)


class Rows(Right):
    """Takes rows for samples."""

    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        call.samples = len(call.backprops)
        return super().operands(call)


class Contiguous(Right):
    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        call.backprops.view(call.samples, -1)
        return super().operands(call)


class Float32(Right):
    """Loses half the digits of float64."""

    def product(self, x: torch.Tensor, grad: torch.Tensor) -> LinearOperand:
        return LinearOperand(x.float(), grad.float())


class Float64(Right):
    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        if call.backprops.dtype != torch.float64:
            call.backprops = call.backprops * 1.01
        return super().operands(call)


class OneSample(Right):
    """Wrong for batches of this size."""

    size = 1

    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        for name, operand in super().operands(call):
            yield name, times(operand, 1.5 if call.samples == self.size else 1.0)


class TwoSamples(OneSample):
    size = 2


class Odd(OneSample):
    size = 3


@dataclass(frozen=True)
class WrongPart(LinearOperand):
    def part(self, samples: slice) -> LinearOperand:
        return LinearOperand(self.activations[samples] * 1.01, self.backprops[samples])


class FormedTwice(Right):
    """Wrong where gradients are not kept, but formed again for the sum."""

    def product(self, x: torch.Tensor, grad: torch.Tensor) -> LinearOperand:
        return WrongPart(x, grad)


class InParts(CompositeRule):
    handles = (Plain,)

    def knows(self, module: Any) -> bool:
        return True

    def rows(self, module: Any, arguments: dict[str, Any]) -> int:
        return len(arguments["input"])

    def run(self, module: Any, arguments: dict[str, Any], recorder: Recorder) -> torch.Tensor:
        return linear(recorder, arguments["input"], Part(module.weight), Part(module.bias), 0)


class NoInputGradient(InParts):
    def run(self, module: Any, arguments: dict[str, Any], recorder: Recorder) -> torch.Tensor:
        return super().run(module, {"input": arguments["input"].detach()}, recorder)


#: by rule: what the message says, and the variation without which the fault stays unseen
WRONG: dict[type, tuple[str, str | None]] = {
    Bias: ("without clipping: 1 of 2 gradients .*'bias': relative error 0.01,", None),
    Norm: ("without clipping: 0 of 2 gradients and the per-sample norms", None),
    Mixed: ("without clipping: 2 of 2 gradients and the per-sample norms", None),
    Float32: ("without clipping: 1 of 2 gradients .*'weight'", None),
    SecondCall: ("called twice: .*'weight'", "called twice"),
    Frozen: ("weight frozen: .*'bias'", "frozen parameters"),
    FrozenToo: ("bias frozen: .*FrozenToo returns .*'bias'", "frozen parameters"),
    NoBias: ("without clipping: 1 of 2 gradients .*'bias': relative error 1,", None),
    Empty: ("0 samples: the engine raised ZeroDivisionError", "fewer samples"),
    OneSample: ("1 samples: ", "fewer samples"),
    TwoSamples: ("2 samples: ", None),
    Odd: ("3 samples: ", "fewer samples"),
    Rows: ("two rows a sample: ", "two rows a sample"),
    Contiguous: ("not contiguous: the engine raised RuntimeError", "order in memory"),
    Float64: ("float32: 2 of 2", "float32"),
    FormedTwice: ("memory_budget=0: .*'weight'", "no memory"),
    NoInputGradient: ("behind a trained layer: ", "behind a layer"),
}
#: inputs and outputs for which the planner takes the strategy that the rule gets wrong
SHAPES: dict[type, tuple[int, int]] = {Norm: (40, 30), FormedTwice: (2, 3)}


@pytest.mark.parametrize("rule", WRONG)
def test_a_wrong_rule_is_found(rule: type) -> None:
    torch.manual_seed(0)
    message, needed = WRONG[rule]
    inputs, outputs = SHAPES.get(rule, (6, 4))
    model, batch = Plain(inputs, outputs), (values(4, 5, inputs),)
    with register_rule(rule()):
        with pytest.raises(AssertionError, match=message):
            assert_per_sample(model, None, batch)
        if needed is not None:
            others = [name for name in VARIATIONS if name != needed]
            assert_per_sample(model, None, batch, variations=others)


@pytest.mark.parametrize("rule", [Right, InParts])
def test_a_right_rule_passes(rule: type) -> None:
    torch.manual_seed(0)
    with register_rule(rule()):
        assert_per_sample(Plain(6, 4), None, (values(4, 5, 6),))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))


IMAGES, LABELS = values(5, 3, 4).float(), torch.tensor([0, 2, 1, 1, 0])


class ReturnsLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = classifier()

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.network(images), labels)


LOSSES: dict[str, tuple[Any, Any, tuple[torch.Tensor, ...]]] = {
    "function": (
        classifier,
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        (IMAGES, LABELS),
    ),
    "criterion": (classifier, nn.CrossEntropyLoss(), (IMAGES, LABELS)),
    "criterion, a function": (classifier, F.cross_entropy, (IMAGES, LABELS)),
    "criterion with weights": (
        classifier, nn.MultiMarginLoss(weight=torch.tensor([1.0, 2.0, 0.5])), (IMAGES, LABELS),
    ),
    "none": (classifier, None, (IMAGES,)),
    "the model's own": (ReturnsLoss, None, (IMAGES, LABELS)),
    "two inputs": (lambda: nn.Bilinear(4, 4, 2), None, (IMAGES, IMAGES.cos())),
    "a state beside the output": (lambda: nn.GRU(4, 2, batch_first=True), None, (IMAGES,)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_forms_of_the_loss(name: str) -> None:
    build, loss, batch = LOSSES[name]
    assert_per_sample(build(), loss, batch)


def test_views_and_the_second_axis() -> None:
    torch.manual_seed(0)
    assert_per_sample(nn.Linear(4, 2), None, (values(6, 3, 4),), views_per_sample=2)
    assert_per_sample(nn.LSTM(4, 2), None, (values(3, 5, 4),), batch_first=False)


def test_model_batch_and_random_state_stay_as_they_are() -> None:
    model, batch = classifier(), (IMAGES.clone(), LABELS)
    model[0] = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten())
    model[1].bias.requires_grad_(False)
    model[3].bias.grad = torch.ones(3)
    before, random = copy.deepcopy(model), torch.get_rng_state()
    assert_per_sample(model, nn.CrossEntropyLoss(), batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(batch[0], IMAGES)
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then)
        assert (now.dtype, now.requires_grad) == (then.dtype, then.requires_grad)
    assert torch.equal(model[3].bias.grad, torch.ones(3))
    assert model[1].weight.grad is None
    assert not any("forward" in module.__dict__ for module in model.modules())


class Centred(nn.Module):
    """Samples mix in front of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x - x.mean(0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Centred, "without clipping: the engine raised NotPerSample.*sample . move"),
        (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(4, 3)), "'0' .BatchNorm1d.*GroupNorm"),
    ],
)
def test_what_the_engine_refuses(build: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_per_sample(build(), None, (IMAGES,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": lambda x: x}, "model=.*expected an nn.Module"),
        ({"model": classifier().eval()}, "model: .*expected training mode"),
        ({"model": nn.Flatten()}, "model: no parameter"),
        ({"model": nn.Sequential(nn.Linear(4, 2), nn.Dropout())}, "model: .*dropout"),
        ({"batch": IMAGES}, "batch: a Tensor, expected a tuple"),
        ({"batch": ()}, "batch: a tuple, expected a tuple of tensors"),
        ({"batch": (IMAGES, torch.tensor(1.0))}, "batch: expected every entry"),
        ({"batch": (IMAGES, LABELS[:3])}, r"batch: shapes .*\(3,\).*same number of rows"),
        ({"batch": (IMAGES[:0],)}, "batch: shapes"),
        ({"views_per_sample": 2}, "multiple of views_per_sample=2"),
        ({"views_per_sample": 0}, "views_per_sample=0: expected"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0: expected"),
        ({"tolerance": -1}, "tolerance=-1: expected"),
        ({"variations": ["backwards"]}, "variations=.*'backwards'.*called twice"),
        (
            {"loss": lambda output, target: F.mse_loss(output, target)},
            r"loss=.*loss\(model, batch\).*lambda model, batch",
        ),
        ({"loss": lambda model, batch: model(batch[0])}, r"loss=.*\[5, 3\], expected a scalar"),
        ({"loss": lambda model, batch: 0 * model(batch[0]).sum()}, "loss=.*gradient is zero"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assert_per_sample(**{"model": classifier(), "loss": None, "batch": (IMAGES,), **arguments})


def test_only_the_variations_that_are_asked_for() -> None:
    torch.manual_seed(0)
    with register_rule(Odd()):
        assert_per_sample(Plain(4, 2), None, (values(4, 3, 4),), variations=["called twice"])
        with pytest.raises(AssertionError, match="3 samples"):
            assert_per_sample(Plain(4, 2), None, (values(4, 3, 4),), variations=["fewer samples"])
