"""What a model keeps between forward passes: buffers, and tensors and numbers in attributes."""

from __future__ import annotations

import operator
import random
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

#: attributes of every module that are no state of a model's own
_MODULES_OWN = frozenset(vars(nn.Module())) - {"_buffers"} | {"forward"}
_CONTAINERS = (list, tuple, dict, set, deque)
_GENERATORS = (torch.Generator, np.random.Generator, random.Random)
_NUMBERS = (bool, int, float, complex, np.generic)
#: how deep containers and objects in attributes are followed
_DEPTH = 4
#: containers with more entries are data, and are not followed
_LONGEST = 4096


#: a tensor, and its version
Mark = tuple[weakref.ref[torch.Tensor], int]


class KeptState:
    """What a model keeps, as it was when this object was made; a trial puts it back.

    Tensors, numbers and random number generators in attributes of the model's modules, also inside
    lists, dicts, sets, deques, tuples, and inside objects that hold a tensor.
    """

    def __init__(self, root: nn.Module):
        self.root = root
        self._modules = list(root.modules())
        #: each container with its content
        self._contents: list[tuple[Any, Any]] = []
        #: by name: number, or tensor with its version and a copy of its values
        self._values: dict[str, Any] = {}
        self._copies: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._generators: list[tuple[Any, Any]] = []
        #: objects that hold no tensor, and are not looked into
        self._others: list[Any] = []
        for name, value in self._walk(self._note):
            if isinstance(value, torch.Tensor):
                self._copies.setdefault(id(value), (value, _version(value), value.detach().clone()))
            self._values[name] = value

    def put_back(self) -> None:
        """Give the model back what it kept."""
        for container, content in self._contents:
            _fill(container, content)
        with torch.no_grad():
            for key, (tensor, version, copy) in self._copies.items():
                if _version(tensor) != version:
                    tensor.detach().copy_(copy)
                    self._copies[key] = (tensor, _version(tensor), copy)
        for generator, state in self._generators:
            _set_state(generator, state)

    def changed(self) -> dict[str, Any]:
        """By name, the tensors (detached copies) and numbers that are not as they were."""
        found: dict[str, Any] = {}
        if self._untouched():
            return found
        for name, value in self._walk(lambda container: None):
            was = self._values.get(name)
            if isinstance(value, torch.Tensor):
                kept = self._copies.get(id(value))
                as_it_was = was is value and kept is not None and kept[1] == _version(kept[0])
                if not as_it_was:
                    found[name] = value.detach().clone()
            elif name not in self._values or not _equal(was, value):
                found[name] = value
        return found

    def _untouched(self) -> bool:
        """Whether every container holds the very objects that it held, and no tensor was written.

        Most passes touch nothing, and looking at what containers hold by name takes longer.
        """
        return (
            _are_same(list(self.root.modules()), self._modules)
            and all(_holds(container, content) for container, content in self._contents)
            and all(_version(tensor) == version for tensor, version, _ in self._copies.values())
            and not any(map(_holds_tensors, self._others))
        )

    def marks(self) -> dict[str, Mark]:
        """By name, what tells whether a tensor is still the same and was not written since."""
        return {
            name: (weakref.ref(value), _version(value))
            for name, value in self._values.items()
            if isinstance(value, torch.Tensor)
        }

    def _note(self, container: Any) -> None:
        if isinstance(container, _GENERATORS):
            self._generators.append((container, _state_of(container)))
        elif isinstance(container, (np.ndarray, *_CONTAINERS)):
            self._contents.append((container, _content(container)))
        else:
            self._others.append(container)

    def _walk(self, note: Callable[[Any], None]) -> Iterator[tuple[str, Any]]:
        """Tensors and numbers by name; `note` is called on all else that may change."""
        seen: set[int] = set()
        for name, module in self.root.named_modules():
            prefix = f"{name}." if name else ""
            note(vars(module))
            for key, value in list(vars(module).items()):
                if key not in _MODULES_OWN:
                    path = prefix if key == "_buffers" else f"{prefix}{key}"
                    yield from _leaves(path, value, note, seen, _DEPTH)


def written(before: Mapping[str, Mark], after: Mapping[str, Mark]) -> set[str]:
    """Names of tensors that were written, or replaced by others, between two times."""
    return {
        name
        for name, (tensor, version) in before.items()
        if name in after and (tensor() is not after[name][0]() or version != after[name][1])
    }


def is_buffer(root: nn.Module, name: str) -> bool:
    """Whether a name of :class:`KeptState` is a buffer's."""
    module, _, key = name.rpartition(".")
    try:
        return key in root.get_submodule(module)._buffers
    except AttributeError:
        return False


def _leaves(
    path: str, value: Any, note: Callable[[Any], None], seen: set[int], depth: int
) -> Iterator[tuple[str, Any]]:
    """Tensors and numbers in an attribute, by name."""
    if isinstance(value, _NUMBERS):  # most attributes are
        yield path, value
        return
    if value is None or isinstance(value, (str, bytes, type, nn.Module, nn.Parameter)):
        return
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if depth == 0 or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, _GENERATORS):
        note(value)
    elif isinstance(value, np.ndarray):
        note(value)
        yield path, value.copy()
    elif isinstance(value, _CONTAINERS) and len(value) > _LONGEST:
        return
    elif isinstance(value, dict):
        note(value)
        dot = path if not path or path.endswith(".") else f"{path}."
        for key, below in list(value.items()):
            yield from _leaves(f"{dot}{key}", below, note, seen, depth - 1)
    elif isinstance(value, set):
        note(value)
    elif isinstance(value, (list, tuple, deque)):
        if not isinstance(value, tuple):
            note(value)
        for place, below in enumerate(value):
            yield from _leaves(f"{path}[{place}]", below, note, seen, depth - 1)
    elif _holds_tensors(value):
        note(vars(value))
        for key, below in list(vars(value).items()):
            yield from _leaves(f"{path}.{key}", below, note, seen, depth - 1)
    else:
        note(value)


def _holds_tensors(value: Any) -> bool:
    """Whether an object has a tensor among its attributes, or in a list or dict among them."""
    for below in getattr(value, "__dict__", {}).values():
        inner = below.values() if isinstance(below, dict) else below
        several = inner if isinstance(below, (dict, list, tuple, deque)) else [below]
        if any(isinstance(one, (torch.Tensor, np.ndarray)) for one in several):
            return True
    return False


def _content(container: Any) -> Any:
    """What a container holds, to be filled in again by :func:`_fill`."""
    if isinstance(container, np.ndarray):
        return container.copy()
    return dict(container) if isinstance(container, dict) else list(container)


def _holds(container: Any, content: Any) -> bool:
    """Whether a container holds this content, in the same order."""
    if isinstance(container, np.ndarray):
        return _equal(container, content)
    if isinstance(container, dict) and not _are_same(container.values(), content.values()):
        return False
    return _are_same(container, content)


def _are_same(some: Collection[Any], others: Collection[Any]) -> bool:
    """Whether two collections have the very same objects, in the same order."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _fill(container: Any, content: Any) -> None:
    if isinstance(container, np.ndarray):
        container[...] = content
    elif _holds(container, content):
        return
    elif isinstance(container, dict):
        own = _MODULES_OWN if _is_of_module(container) else ()
        for key in [key for key in container if key not in own]:
            del container[key]
        container.update({key: value for key, value in content.items() if key not in own})
    else:
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(content)


def _is_of_module(container: dict[str, Any]) -> bool:
    """Whether a dict is the ``__dict__`` of a module."""
    return isinstance(container, dict) and "_parameters" in container and "_modules" in container


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    return a is b or bool(a == b)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return (
        generator.getstate()
        if isinstance(generator, random.Random)
        else (generator.bit_generator.state)
    )


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state
