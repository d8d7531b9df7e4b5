"""What a model keeps between passes: every change is seen, and put back."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dpkernels.engine.trial.state import KeptState


class _Keeper(nn.Module):
    """Keeps something of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("buffer", torch.zeros(2))
        self.tensor = torch.zeros(2)
        self.number = 1
        self.array = np.zeros(2)
        self.several = [torch.zeros(2)]
        self.by_name = {"a": 1}
        self.holder = SimpleNamespace(tensor=torch.zeros(2))
        self.empty = SimpleNamespace(tensor=None, several=[])


CHANGES: dict[str, tuple[Callable[[_Keeper], object], str]] = {
    "buffer written": (lambda m: m.buffer.add_(1), "buffer"),
    "buffer of a module below": (
        lambda m: m.layer.register_buffer("late", torch.ones(1)),
        "layer.late",
    ),
    "tensor written": (lambda m: m.tensor.add_(1), "tensor"),
    "tensor replaced": (lambda m: setattr(m, "tensor", torch.ones(2)), "tensor"),
    "number": (lambda m: setattr(m, "number", 2), "number"),
    "array written": (lambda m: m.array.__iadd__(1), "array"),
    "list longer": (lambda m: m.several.append(torch.ones(1)), "several[1]"),
    "tensor in a list": (lambda m: m.several[0].add_(1), "several[0]"),
    "key": (lambda m: m.by_name.update(b=2), "by_name.b"),
    "tensor in an object": (lambda m: m.holder.tensor.add_(1), "holder.tensor"),
    "attribute of an object": (lambda m: setattr(m.holder, "more", 1), "holder.more"),
    "new attribute": (lambda m: setattr(m, "late", torch.ones(1)), "late"),
    "first tensor of an object": (
        lambda m: setattr(m.empty, "tensor", torch.ones(1)),
        "empty.tensor",
    ),
    "first tensor in its list": (
        lambda m: m.empty.several.append(torch.ones(1)),
        "empty.several[0]",
    ),
}
#: seen, and not put back
SEEN: dict[str, tuple[Callable[[_Keeper], object], str]] = {
    "module": (lambda m: m.add_module("late", nn.BatchNorm1d(3)), "late.running_mean"),
}


@pytest.mark.parametrize("which", [*CHANGES, *SEEN])
def test_a_change_is_seen_by_name(which: str) -> None:
    model = _Keeper()
    state = KeptState(model)
    assert state.changed() == {}
    change, name = (CHANGES | SEEN)[which]
    change(model)
    assert name in state.changed()
    state.put_back()
    assert (state.changed() == {}) == (which in CHANGES)


def test_what_a_module_has_from_torch_is_left_alone() -> None:
    model = _Keeper()
    state = KeptState(model)
    model.eval()
    assert state.changed() == {}
    model.number = 2
    state.put_back()
    assert (model.number, model.training) == (1, False)
