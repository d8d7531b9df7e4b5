"""Models that are exact for every sample train as without trials, which leave nothing behind."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.engine.hard_cases.trained import (
    Forward,
    Net,
    assert_no_alarm,
    floats,
    plain,
    squares,
    texts,
    train,
)


def layer_dropped(draw: Callable[[nn.Module], float]) -> Forward:
    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        hidden = net.a(x)
        for _ in range(4):
            hidden = hidden.tanh() if draw(net) < 0.5 else hidden
        return net.b(F.dropout(hidden, 0.2))

    return forward


class Draws:
    def __init__(self) -> None:
        self.generator = random.Random(1)


def keep(**values: Callable[[], Any]) -> Callable[[nn.Module], None]:
    """Give a model attributes, each made anew."""

    def put(net: nn.Module) -> None:
        for name, make in values.items():
            setattr(net, name, make())

    return put


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


CHANCE = {
    "torch": (lambda net: torch.rand(()), None),
    "numpy": (lambda net: np.random.rand(), None),  # noqa: NPY002
    "python": (lambda net: random.random(), None),
    "generator": (lambda net: torch.rand((), generator=net.own), keep(own=generator)),
    "Generator": (lambda net: net.own.random(), keep(own=lambda: np.random.default_rng(1))),
    "RandomState": (lambda net: net.own.rand(), keep(own=lambda: np.random.RandomState(1))),
    "object": (lambda net: net.own.generator.random(), keep(own=Draws)),
    "partial": (
        lambda net: net.own(()),
        keep(own=lambda: functools.partial(torch.rand, generator=generator())),
    ),
}


@pytest.mark.parametrize("source", CHANCE)
def test_random_numbers_of_any_source(source: str) -> None:
    draw, put = CHANCE[source]
    assert_no_alarm(layer_dropped(draw), floats(4, 3, 5, 1, 2, 33), keep=put)


class Meter:
    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.sum, self.count = self.sum + value, self.count + 1


def test_a_log_of_numbers_goes_on_as_it_would() -> None:
    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        output = plain(net, x)
        net.meter.update(float(output.detach().mean()))
        net.log.append(net.meter.sum)
        return output

    trained = assert_no_alarm(forward, floats(4, 3, 5), keep=keep(meter=Meter, log=list))
    assert trained.net.meter.count == len(trained.net.log) == 3
    assert np.isfinite(trained.net.meter.sum)


def counted(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.steps += 1
    return plain(net, x) * 0.9**net.steps


def mapped(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.maps = {"hidden": net.a(x)}
    return net.b(net.maps["hidden"])


def causal(net: Net, x: torch.Tensor) -> torch.Tensor:
    """A mask that grows with the longest batch so far."""
    steps = x.shape[1]
    if net.mask is None or len(net.mask) < steps:
        net.mask = torch.ones(steps, steps).tril()
    return net.b(net.mask[:steps, :steps] @ net.a(x) / steps)


def averaged_teacher(net: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        net.teacher.weight.data.mul_(0.9).add_(net.a.weight, alpha=0.1)
        target = net.teacher(x)
    return net.b(net.a(x) - target)


def replaced_teacher(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.teacher.weight.data = 0.9 * net.teacher.weight.data + 0.1 * net.a.weight.data
    return net.b(net.a(x) - net.teacher(x))


def hooked(net: Net, x: torch.Tensor) -> torch.Tensor:
    """Hooks that the first forward pass sets, as transformers' for hidden states."""
    if not net.hooked:
        net.a.register_forward_hook(lambda module, given, output: output + 0.5)
        net.hooked = True
    return plain(net, x)


def counted_in_a_list(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.hidden[0].calls += 1
    return plain(net, x) * net.hidden[0].calls


def counting() -> list[nn.Module]:
    module = nn.Identity()
    module.register_buffer("calls", torch.zeros(()))
    return [module]


STATE = {
    "steps": (counted, keep(steps=lambda: 0), (5,)),
    "maps": (mapped, None, (5,)),
    "mask": (causal, keep(mask=lambda: None), None),
    "mask-buffer": (causal, lambda net: net.register_buffer("mask", None), None),
    "teacher": (averaged_teacher, None, (5,)),
    "teacher-replaced": (replaced_teacher, None, (5,)),
    "hooks": (hooked, keep(hooked=lambda: False), (5,)),
    "module-in-list": (counted_in_a_list, keep(hidden=counting), (5,)),
}


@pytest.mark.parametrize("name", STATE)
def test_state_that_is_nobodys(name: str) -> None:
    forward, put, shape = STATE[name]
    if shape is None:
        lengths = (6, 9, 6, 12, 3, 6)
        batches = [floats(4, shape=(steps, 5))[0] for steps in lengths]
    else:
        batches = floats(4, 3, 5, 1, 2, shape=shape)
    assert_no_alarm(forward, batches, keep=put)


def in_place(net: Net, x: torch.Tensor) -> torch.Tensor:
    x.sub_(0.5)
    x[:, 0] = 0
    return plain(net, x)


def test_the_callers_batch_is_changed_once() -> None:
    assert_no_alarm(in_place, floats(4, 3))

    def of_no_leaf(model: nn.Module, batch: Any) -> torch.Tensor:
        return squares(model(batch[0].requires_grad_() * 1))

    assert_no_alarm(in_place, floats(4, 3), loss=of_no_leaf)


def test_lists_and_dicts_of_the_caller_are_filled() -> None:
    def forward(net: Net, x: torch.Tensor, maps: list[Any], named: dict[str, Any]) -> torch.Tensor:
        maps.append(net.a(x))
        named["hidden"] = maps[-1]
        return net.b(maps[-1])

    sizes: list[int] = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        maps: list[Any] = []
        named: dict[str, Any] = {}
        output = model(*batch, maps, named)
        sizes.append(len(maps) + len(named))
        return squares(output)

    assert_no_alarm(forward, floats(4, 3), loss=loss)
    assert sizes == [2] * 4


def test_leaves_beside_the_parameters_keep_their_gradients() -> None:
    """A prompt of the user's own, of which nothing is released, is never NaN."""

    def gradient(trial: str) -> torch.Tensor | None:
        prompt = torch.zeros(5, requires_grad=True)
        train(lambda net, x: plain(net, x + prompt), floats(4, 3), trial)
        return prompt.grad

    torch.testing.assert_close(gradient("every"), gradient("off"))


def test_a_loss_that_training_leaves_aside_is_refused_once_it_is_differentiated() -> None:
    def forward(net: Net, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = net.b(net.a(net.table(ids)))
        labels = (ids % 3).masked_fill(~mask, -100)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    assert_no_alarm(forward, texts(4, 3), loss=lambda model, batch: squares(model(*batch)[1]))
    for trial in ("first", "every"):
        with pytest.raises(ValueError, match="own loss couples samples"):
            train(forward, texts(4, 3), trial, loss=lambda model, batch: model(*batch)[0])


def trimmed(net: Net, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    longest = int(mask.sum(1).max())
    ids, mask = ids[:, :longest], mask[:, :longest]
    hidden = F.dropout(net.b(net.a(net.table(ids)).tanh()), 0.2, net.training)
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def follows_the_longest(net: Net, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return trimmed(net, ids, mask) * mask.sum(1, keepdim=True) / mask.sum(1).max()


def lengths_for(forward: Forward) -> Forward:
    return lambda net, ids, mask: forward(net, ids, torch.arange(ids.shape[1]) < mask[:, None])


TOLD_BY = {
    "mask": (lambda f: f, lambda ids, mask: (ids, mask)),
    "integers": (lambda f: f, lambda ids, mask: (ids, mask.long())),
    "lengths": (lengths_for, lambda ids, mask: (ids, mask.sum(1))),
    "padding": (lambda f: lambda net, ids: f(net, ids, ids != 0), lambda ids, mask: (ids,)),
}


@pytest.mark.parametrize("told_by", TOLD_BY)
def test_a_batch_trimmed_to_its_longest_sample(told_by: str) -> None:
    """Every sample's share is exact where padding counts for nothing; else the model is refused."""
    wrap, arguments = TOLD_BY[told_by]
    batches = [arguments(*batch) for batch in texts(4, 3, 5, 2, 8)]
    assert_no_alarm(wrap(trimmed), batches)
    with pytest.raises(ValueError, match="move when samples"):
        train(wrap(follows_the_longest), batches, "every")


def attended(net: Net, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    hidden = net.a(x)
    return net.b((hidden @ hidden.transpose(1, 2) + mask).softmax(-1) @ hidden)


def test_masks_of_infinities_break_nobody() -> None:
    """Layers of several rows for each sample could otherwise never train."""
    mask = torch.zeros(4, 1, 6)
    mask[:, :, 4:] = -torch.inf

    def forward(net: Net, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attended(net, x, mask) + net.b(net.a(x.flatten(0, 1))).view(len(x), -1, 3)

    batches = [(x, mask[: len(x)]) for (x,) in floats(4, 3, shape=(6, 5))]
    assert_no_alarm(forward, batches)

    def mixes(net: Net, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attended(net, x - x.mean(0), mask)

    with pytest.raises(ValueError, match=r"sample \d move"):
        train(mixes, batches, "every")


def test_sparse_batches() -> None:
    def forward(net: Net, x: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        return plain(net, x + sparse.to_dense())

    dense = floats(4, 3)
    assert_no_alarm(forward, [(x, x.relu().to_sparse()) for (x,) in dense])

    def mixes(net: Net, x: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        return plain(net, x + sparse.to_dense().mean(0))

    with pytest.raises(ValueError, match=r"sample \d move"):
        train(mixes, [(x, x.relu().to_sparse()) for (x,) in dense], "every")


def test_a_frozen_parameter_that_keeps_private_data_is_refused() -> None:
    """A codebook that follows what it encodes."""

    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        net.teacher.bias.data.mul_(0.9).add_(0.1 * net.a(x).detach().mean(0))
        return plain(net, x)

    with pytest.raises(ValueError, match="frozen parameter 'teacher.bias'.*private data"):
        train(forward, floats(4, 3), "first")


def test_a_mask_for_all_samples_may_be_as_long_as_the_batch() -> None:
    mask = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9)
    batches = [(x, mask) for (x,) in floats(4, 6, 3, shape=(6, 5))]
    assert_no_alarm(attended, batches)
    with pytest.raises(ValueError, match=r"args\[1\] of shape \[6, 6\].*mask\[None\]"):
        train(attended, batches[1:], "first")
    assert_no_alarm(attended, [(x, mask[None]) for x, _ in batches[1:]])


def checkpointed(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.b(checkpoint(lambda v: F.dropout(net.a(v), 0.2), x, use_reentrant=False))


def switched(net: Net, x: torch.Tensor) -> torch.Tensor:
    expert = net.a(x)[:, :2].argmax(1, keepdim=True)
    return net.b(torch.where(expert == 0, net.teacher(x), net.a(x)))


def refuses_poisons(net: Net, x: torch.Tensor) -> torch.Tensor:
    assert x.isfinite().all()
    assert x.abs().max() < 10
    assert x.any(1).all()
    return plain(net, x)


def looks_for_nan(net: Net, x: torch.Tensor) -> torch.Tensor:
    return plain(net, x if x.isfinite().all() else x.nan_to_num())


PROGRAMS = {
    "checkpoint": checkpointed,
    "experts": switched,
    "refuses-poisons": refuses_poisons,
    "looks-for-nan": looks_for_nan,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        assert_no_alarm(PROGRAMS[name], floats(4, 3, 5, 1, 2, 33))


def test_kernels_that_are_not_deterministic_are_told_once() -> None:
    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        chance = int.from_bytes(os.urandom(2), "big") / 65536
        return net.b((net.a(x).double() * (1 + 1e-6 * chance)).float())

    said = train(forward, floats(4, 3, 5), "every").warnings
    assert [text for text in said if "do not have equal bits" in text] == list(said)

    def noisy(net: Net, x: torch.Tensor) -> torch.Tensor:
        return net.b(net.a(x) * (1 + int.from_bytes(os.urandom(2), "big") / 65536))

    with pytest.raises(ValueError, match="told apart from chance.*trial='off'"):
        train(noisy, floats(4, 3), "every")
