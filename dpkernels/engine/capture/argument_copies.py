"""Copies of a call's arguments, for a trial that calls a module more often than the model does."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

#: what a copy shares with the original; functions and classes also where they are local
_SHARED = (nn.Module, type, FunctionType, BuiltinFunctionType)
_PLAIN = (torch.Tensor, PackedSequence, str, bytes, bool, int, float, complex, type(None))


class _Pickler(pickle.Pickler):
    """Pickles all but tensors and what is shared, which it keeps."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)
        self.kept: list[Any] = []

    def persistent_id(self, one: Any) -> int | None:
        if not isinstance(one, (torch.Tensor, *_SHARED)):
            return None
        self.kept.append(one)
        return len(self.kept) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, stream: io.BytesIO, kept: list[Any], change: Callable[[torch.Tensor], None] | None
    ):
        super().__init__(stream)
        self.kept, self.change = kept, change

    def persistent_load(self, number: int) -> Any:
        one = self.kept[number]
        if isinstance(one, _SHARED):
            return one
        copy = one.detach().clone()
        if self.change is not None:
            self.change(copy)
        return copy.requires_grad_(one.requires_grad)


def argument_copy(value: Any, change: Callable[[torch.Tensor], None] | None = None) -> Any:
    """A copy of an argument that is no tensor, such as a cache that grows as the model runs.

    The copy holds copies of tensors, and shares modules. What cannot be copied stays itself.

    Args:
        value: the argument.
        change: called on the copy of every tensor in it.
    """
    if isinstance(value, (*_PLAIN, *_SHARED)):
        return value
    stream = io.BytesIO()
    try:
        pickler = _Pickler(stream)
        pickler.dump(value)
        return _Unpickler(io.BytesIO(stream.getvalue()), pickler.kept, change).load()
    except Exception:  # an object may refuse in any way
        return value
