"""Copies of arguments that are no tensors: own tensors, shared modules, the original's sharing."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from dpkernels.engine.capture.argument_copies import argument_copy


@dataclass
class Cache:
    """Grows as a model runs."""

    keys: list[torch.Tensor] = field(default_factory=list)
    more: Any = None


@pytest.mark.parametrize("value", [1, 2.5, "text", None, True, b"bytes", 1j])
def test_plain_values_are_themselves(value: Any) -> None:
    assert argument_copy(value) is value


def test_tensors_modules_functions_and_classes_are_themselves() -> None:
    def local() -> None: ...

    for value in (torch.ones(2), nn.Linear(2, 2), local, Cache, len, lambda: 1):
        assert argument_copy(value) is value


def test_a_cache_grows_in_its_copy_alone() -> None:
    cache = Cache([torch.zeros(2)], {"a": torch.ones(1)})
    copy = argument_copy(cache)
    assert isinstance(copy, Cache)
    copy.keys.append(torch.ones(2))
    copy.keys[0].add_(1)
    copy.more["a"].zero_()
    copy.more["b"] = 1
    assert len(cache.keys) == 1
    assert not bool(cache.keys[0].any())
    assert cache.more == {"a": torch.ones(1)}


def test_copies_keep_whether_gradients_are_wanted_and_no_graph() -> None:
    leaf = torch.ones(2, requires_grad=True)
    copy = argument_copy(Cache([leaf * 2, torch.ones(2)]))
    assert [t.requires_grad for t in copy.keys] == [True, False]
    assert all(t.is_leaf for t in copy.keys)


def test_modules_and_local_functions_inside_are_shared() -> None:
    def local() -> int:
        return 3

    layer = nn.Linear(2, 2)
    copy = argument_copy(Cache([], {"layer": layer, "call": local}))
    assert copy.more["layer"] is layer
    assert copy.more["call"] is local


def test_parts_that_were_one_stay_one() -> None:
    shared: list[int] = [1]
    copy = argument_copy(Cache([], (shared, shared, deque([1], maxlen=3))))
    one, other, queue = copy.more
    assert one is other
    assert one is not shared
    assert queue.maxlen == 3


def test_what_cannot_be_copied_is_itself() -> None:
    for value in (threading.Lock(), Cache([], threading.Lock()), (n for n in range(2))):
        assert argument_copy(value) is value


def test_an_object_that_refuses_to_be_copied_is_itself() -> None:
    class Refusing:
        def __reduce__(self) -> str:
            raise RuntimeError("no")

    value = Refusing()
    assert argument_copy(value) is value
