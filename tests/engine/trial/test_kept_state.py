"""What a model keeps between passes is put back whole, and what a pass changed is named."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dpkernels.engine.trial.state import KeptState, parameter_fingerprints, published_as, written


class Keeper(nn.Module):
    """A module with state of every kind, in itself and in a module below."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("buffer", torch.zeros(3))
        self.register_buffer("late", None)
        self.sparse = torch.eye(2).to_sparse()
        self.tensor, self.number, self.nothing = torch.ones(2), 1.5, None
        self.list = [torch.zeros(2), 3, "text"]
        self.pair = (torch.zeros(2), 4)
        self.dict = {"a": torch.zeros(2), "b": {"c": [1, torch.ones(1)]}}
        self.deque = deque([torch.zeros(1), torch.ones(1)], maxlen=2)
        self.set = {1, 2}
        self.array = np.zeros(3)
        self.object = SimpleNamespace(mean=torch.zeros(2), steps=0)
        self.empty = SimpleNamespace()
        self.ordered = OrderedDict(b=1, a=2)
        self.default = defaultdict(list)
        self.below = nn.Module()
        self.below.tensor = torch.ones(2)
        self.view = self.tensor[:1]


Change = Callable[[Keeper], Any]

CHANGES: dict[str, tuple[Change, set[str]]] = {
    "buffer_in_place": (lambda m: m.buffer.add_(1), {"buffer"}),
    "buffer_replaced": (lambda m: setattr(m, "buffer", torch.ones(3)), {"buffer"}),
    "buffer_filled": (lambda m: setattr(m, "late", torch.ones(3)), {"late"}),
    "buffer_added": (lambda m: m.register_buffer("more", torch.ones(3)), {"more"}),
    "buffer_emptied": (lambda m: setattr(m, "buffer", None), set()),
    "tensor_in_place": (lambda m: m.tensor.mul_(2), {"tensor", "view"}),
    "tensor_through_view": (lambda m: m.view.mul_(2), {"tensor", "view"}),
    "sparse": (lambda m: m.sparse.mul_(2), {"sparse"}),
    "tensor_replaced": (lambda m: setattr(m, "tensor", m.tensor + 1), {"tensor"}),
    "tensor_through_data": (lambda m: m.tensor.data.zero_(), {"tensor", "view"}),
    "tensor_through_array": (lambda m: m.tensor.numpy().fill(3.0), {"tensor", "view"}),
    "memory_replaced": (lambda m: setattr(m.tensor, "data", torch.zeros(2)), {"tensor"}),
    "resized": (lambda m: setattr(m.tensor, "data", torch.zeros(4)), {"tensor"}),
    "buffer_through_data": (lambda m: m.buffer.data.add_(1), {"buffer"}),
    "number": (lambda m: setattr(m, "number", 2.5), {"number"}),
    "number_made_tensor": (lambda m: setattr(m, "number", torch.ones(1)), {"number"}),
    "nothing": (lambda m: setattr(m, "nothing", torch.ones(1)), {"nothing"}),
    "added": (lambda m: setattr(m, "more", torch.ones(1)), {"more"}),
    "deleted": (lambda m: delattr(m, "tensor"), set()),
    "list_entry": (lambda m: m.list.__setitem__(0, torch.ones(2)), {"list[0]"}),
    "list_grown": (lambda m: m.list.append(torch.ones(1)), {"list[3]"}),
    "list_emptied": (lambda m: m.list.clear(), set()),
    "list_in_place": (lambda m: m.list[0].add_(1), {"list[0]"}),
    "list_replaced": (lambda m: setattr(m, "list", [torch.ones(2), 3]), {"list[0]"}),
    "pair": (lambda m: m.pair[0].add_(1), {"pair[0]"}),
    "dict_entry": (lambda m: m.dict.update(a=torch.ones(2)), {"dict.a"}),
    "dict_deep": (lambda m: m.dict["b"]["c"][1].add_(1), {"dict.b.c[1]"}),
    "dict_deep_number": (lambda m: m.dict["b"]["c"].__setitem__(0, 7), {"dict.b.c[0]"}),
    "dict_popped": (lambda m: m.dict.pop("a"), set()),
    "deque": (lambda m: m.deque.append(torch.ones(1)), {"deque[0]", "deque[1]"}),
    "set": (lambda m: m.set.add(3), {"set"}),
    "array_in_place": (lambda m: np.add(m.array, 1, out=m.array), {"array"}),
    "array_replaced": (lambda m: setattr(m, "array", np.ones(3)), {"array"}),
    "object": (lambda m: setattr(m.object, "mean", torch.ones(2)), {"object.mean"}),
    "object_in_place": (lambda m: m.object.mean.add_(1), {"object.mean"}),
    "object_number": (lambda m: setattr(m.object, "steps", 1), {"object.steps"}),
    "object_filled": (lambda m: setattr(m.empty, "mean", torch.ones(2)), {"empty.mean"}),
    "ordered": (lambda m: m.ordered.update(c=3), {"ordered.c"}),
    "default": (lambda m: m.default["a"].append(torch.ones(1)), {"default.a[0]"}),
    "below": (lambda m: m.below.tensor.add_(1), {"below.tensor"}),
}


def shown(model: Keeper) -> str:
    kept = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("_parameters", "_modules")
    }
    return repr(sorted(kept.items(), key=lambda item: item[0]))


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_named_and_put_back(name: str) -> None:
    change, names = CHANGES[name]
    model = Keeper()
    before = shown(model)
    held = dict(vars(model))
    state = KeptState(model)
    assert state.changed() == {}
    change(model)
    assert set(state.changed()) == names
    state.put_back()
    assert shown(model) == before
    assert all(vars(model)[key] is value for key, value in held.items())
    assert state.changed() == {}


def test_nothing_changed_writes_nothing() -> None:
    """Tensors keep their versions, so that graphs which saved them stay valid."""
    model = Keeper()
    versions = [b._version for b in model.buffers()] + [model.tensor._version]
    KeptState(model).put_back()
    assert versions == [b._version for b in model.buffers()] + [model.tensor._version]


def test_parameters_that_passes_write_are_state() -> None:
    model = Keeper()
    before = parameter_fingerprints(model)
    kept, weight = model.layer.weight.detach().clone(), model.layer.weight
    state = KeptState(model, {"layer.weight"})
    weight.data.add_(1)
    after = parameter_fingerprints(model)
    assert [n for n in after if not torch.equal(before[n], after[n])] == ["layer.weight"]
    assert set(state.changed()) == {"layer.weight"}
    model.layer.bias = nn.Parameter(torch.zeros(2))
    assert set(state.changed()) == {"layer.weight", "layer.bias"}, "replaced"
    state.put_back()
    assert model.layer.weight is weight
    assert torch.equal(weight, kept)
    assert state.changed() == {}


def test_other_parameters_are_no_state() -> None:
    model = Keeper()
    state = KeptState(model)
    with torch.no_grad():
        model.layer.weight.add_(1)
    kept = model.layer.weight.detach().clone()
    assert state.changed() == {}
    state.put_back()
    assert torch.equal(model.layer.weight, kept)


@pytest.mark.parametrize("make", [
    lambda: torch.Generator().manual_seed(1), lambda: np.random.default_rng(1),
    lambda: random.Random(1),
])  # fmt: skip
@pytest.mark.parametrize("inside", [False, True])
def test_generators_draw_the_same_again(make: Callable[[], Any], inside: bool) -> None:
    def draw() -> float:
        if isinstance(generator, torch.Generator):
            return float(torch.rand((), generator=generator))
        return generator.random()

    model, generator = Keeper(), make()
    model.draws = [{"own": generator}] if inside else generator
    state = KeptState(model)
    first = draw()
    assert state.changed() == {}
    state.put_back()
    assert draw() == first


def test_objects_that_lead_elsewhere_are_left_alone() -> None:
    """A trainer in an attribute counts its own steps."""
    model = Keeper()
    model.trainer = SimpleNamespace(loop=SimpleNamespace(steps=0), model=model)
    state = KeptState(model)
    model.trainer.loop.steps = 1
    assert state.changed() == {}
    state.put_back()
    assert model.trainer.loop.steps == 1


def test_data_in_long_lists_is_left_alone() -> None:
    model = Keeper()
    model.data = [0.0] * 5000
    state = KeptState(model)
    model.data[3] = 1.0
    assert state.changed() == {}


def test_a_cycle_ends() -> None:
    model = Keeper()
    model.list.append(model.list)
    state = KeptState(model)
    model.list[0] = torch.ones(2)
    assert set(state.changed()) == {"list[0]"}
    state.put_back()
    assert not bool(model.list[0].any())


def test_not_a_number_is_as_it_was() -> None:
    model = Keeper()
    model.number = float("nan")
    model.array[0] = np.nan
    state = KeptState(model)
    assert state.changed() == {}


def test_what_was_written_between_two_times() -> None:
    model = Keeper()
    before = KeptState(model).marks()
    assert written(before, KeptState(model).marks()) == set()
    model.buffer.add_(1)
    model.tensor = model.tensor + 1
    model.list[0] = torch.ones(2)
    model.number = 2.5
    assert written(before, KeptState(model).marks()) == {"buffer", "tensor", "list[0]"}


def test_names_of_buffers() -> None:
    model = Keeper()
    model.below.register_buffer("mean", torch.zeros(1))
    assert published_as(model, "buffer") == published_as(model, "below.mean") == "buffer"
    for name in ("tensor", "list[0]", "below.tensor", "dict.a", "nowhere.at.all"):
        assert published_as(model, name) != "buffer"


def test_what_a_module_has_from_torch_is_left_alone() -> None:
    model = Keeper()
    state = KeptState(model)
    model.eval()
    assert state.changed() == {}
    model.number = 2.5
    state.put_back()
    assert (model.number, model.training) == (1.5, False)
