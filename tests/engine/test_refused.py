"""What the engine refuses, and that the message says what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    WeightedRandomSampler,
)

from dpkernels import PrivacyEngine
from dpkernels.layers import register_rule
from dpkernels.layers.composite import CompositeRule, Found, Recorder, mark
from dpkernels.layers.linear import LinearRule
from dpkernels.layers.operands import Operand, StoredOperand
from dpkernels.layers.rule import CapturedCall
from tests.engine.support import (
    cnn,
    images,
    made_private,
    private,
    step,
)


def test_second_backward_under_poisson_sampling_is_refused() -> None:
    _, model, optimizer, _ = private(cnn(), images(16))
    x, y = images(4).tensors
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="not compatible with grad accumulation"):
        nn.functional.cross_entropy(model(x), y).backward()


def test_noise_cleared_while_accumulating_is_refused() -> None:
    _, model, optimizer, _ = private(cnn(), images(16), poisson_sampling=False)
    x, y = images(4).tensors
    nn.functional.cross_entropy(model(x), y).backward()
    first, second = list(model.parameters())[:2]
    kept = first.grad.clone()
    second.grad = None
    with pytest.raises(ValueError, match="no noise.*zero_grad"):
        nn.functional.cross_entropy(model(x), y).backward()
    assert torch.equal(first.grad, kept)


def test_steps_without_cleared_or_private_gradients_are_refused() -> None:
    _, model, optimizer, _ = private(cnn(), images(16))
    x, y = images(4).tensors
    with pytest.raises(ValueError, match="Not updated in backward pass"):
        optimizer.step()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="haven't been cleared"):
        nn.functional.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    parameter = next(model.parameters())
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="was not made private"):
        optimizer.step()


def test_a_second_optimizer_step_does_not_reuse_a_gradient() -> None:
    engine, model, optimizer, _ = private(cnn(), images(16))
    x, y = images(4).tensors
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="haven't been cleared"):
        optimizer.step()
    assert engine.accountant.history[0][2] == 1


def test_bad_input_is_named() -> None:
    model, dataset = cnn(), images(16)
    with pytest.raises(UnsupportedModuleError, match="BatchNorm2d.*GroupNorm"):
        private(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), dataset)
    with pytest.raises(UnsupportedModuleError, match="track_running_stats=False"):
        private(nn.InstanceNorm2d(3, track_running_stats=True, affine=True), dataset)
    with pytest.raises(UnsupportedModuleError, match="training mode"):
        private(cnn().eval(), dataset)
    with pytest.raises(ValueError, match="noise_multiplier=-1"):
        private(model, dataset, noise=-1.0)
    with pytest.raises(ValueError, match="max_grad_norm=0"):
        private(model, dataset, max_grad_norm=0.0)
    with pytest.raises(ValueError, match="views_per_sample=0"):
        private(model, dataset, views_per_sample=0)
    with pytest.raises(ValueError, match="trial='sometimes': expected one of 'doubling', 'first'"):
        private(model, dataset, trial="sometimes")
    with pytest.raises(ValueError, match="trial: only grad_sample_mode='fused' takes it"):
        private(model, dataset, trial="off", grad_sample_mode="hooks")
    with pytest.raises(ValueError, match="grad_sample_mode='nonsense'.*'fused'.*ghost"):
        private(model, dataset, grad_sample_mode="nonsense")
    with pytest.raises(ValueError, match="clipping='nonsense'"):
        private(model, dataset, clipping="nonsense")
    foreign = torch.optim.SGD(cnn().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="not in the module"):
        PrivacyEngine().make_private(
            module=model, optimizer=foreign, data_loader=DataLoader(dataset, batch_size=4),
            noise_multiplier=1.0, max_grad_norm=1.0,
        )  # fmt: skip
    _, wrapped, optimizer, _ = private(model, dataset, views_per_sample=2)
    with pytest.raises(ValueError, match="views_per_sample=2.*3 rows"):
        wrapped(dataset.tensors[0][:3])


def test_nan_input_names_the_sample_and_releases_nothing() -> None:
    _, model, optimizer, _ = private(cnn(), images(16))
    x, y = images(4).tensors
    model(x)
    x = x.clone()
    x[2, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="sample 2 .*not finite"):
        nn.functional.cross_entropy(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())
    nn.functional.cross_entropy(model(images(4).tensors[0]), y).backward()
    optimizer.step()


def test_samplers_that_poisson_sampling_would_replace_are_refused() -> None:
    dataset = images(16)
    loader = DataLoader(dataset, batch_size=4, sampler=WeightedRandomSampler([1.0] * 16, 16))
    model = cnn()
    with pytest.raises(ValueError, match="WeightedRandomSampler"):
        PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
            noise_multiplier=1.0, max_grad_norm=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_a_dataset_without_length_is_refused(poisson_sampling: bool) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(3, 8, 8), 0)] * 8)

    with pytest.raises(ValueError, match="Stream has no length"):
        private(cnn(), Stream(), poisson_sampling=poisson_sampling)


class Shift(nn.Linear):
    """A layer of one's own, whose rules hand over the bias' gradients, trained or not."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight, self.bias)


class ShiftRule(LinearRule):
    handles = (Shift,)

    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        yield from (found for found in super().operands(call) if found[0] != "bias")
        yield "bias", StoredOperand(call.backprops)


class ShiftInParts(CompositeRule):
    handles = (Shift,)

    def knows(self, module: Any) -> bool:
        return True

    def rows(self, module: Any, arguments: dict[str, Any]) -> int:
        return len(arguments["input"])

    def run(self, module: Any, arguments: dict[str, Any], recorder: Recorder) -> torch.Tensor:
        def operands(backprops: torch.Tensor, saved: Any) -> Found:
            if recorder.wants(module.weight):
                yield module.weight, StoredOperand(torch.einsum("bo,bi->boi", backprops, saved[0]))
            yield module.bias, StoredOperand(backprops)

        x = arguments["input"]
        output = nn.functional.linear(x, module.weight.detach(), module.bias.detach())
        return mark(recorder, output, operands, x)


@pytest.mark.parametrize("rule", [ShiftRule(), ShiftInParts()])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_operand_for_a_frozen_parameter_is_refused(rule: Any, frozen: bool) -> None:
    """The operand's gradient would count in the norms of samples, and be released nowhere."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    model = nn.Sequential(nn.Linear(4, 4), Shift(4, 3))
    model[1].bias.requires_grad_(not frozen)
    with register_rule(rule):
        _, model, optimizer, _ = made_private(model, x)
    if frozen:
        refused = rf"layer '1' \(Shift\): {type(rule).__name__} returns .* for '(1\.)?bias'"
        with pytest.raises(ValueError, match=refused):
            model(x).square().sum().backward()
        assert all(p.grad is None for p in model.parameters())
    else:
        step(model, optimizer, x)
        assert all(bool(p.grad.any()) for p in model.parameters())
