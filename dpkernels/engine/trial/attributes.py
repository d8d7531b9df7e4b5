"""What attributes of a model hold: tensors, numbers, containers and generators, to put back."""

from __future__ import annotations

import operator
import random
from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

#: attributes of every module that are no state of a model's own
MODULES_OWN = frozenset(vars(nn.Module())) - {"_buffers"} | {"forward"}
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CONTAINERS = (list, tuple, dict, set, deque)
_NUMBERS = (bool, int, float, complex, np.generic)
_NO_STATE = (str, bytes, type, ModuleType, FunctionType, nn.Parameter)
#: how deep containers and objects in attributes are followed
_DEPTH = 4
#: containers with more entries are data, and are not followed
_LONGEST = 4096


def leaves(
    path: str, value: Any, note: Callable[[Any], None], seen: set[int], depth: int = _DEPTH
) -> Iterator[tuple[str, Any]]:
    """Tensors, numbers and modules in an attribute, by name.

    Args:
        path: name of the attribute.
        value: what it holds.
        note: called on every container and generator.
        seen: ids of what has been met, which grows.
        depth: how many containers inside one another are followed.
    """
    if isinstance(value, _NUMBERS):  # most attributes are
        yield path, value
        return
    if value is None or isinstance(value, _NO_STATE):
        return
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if depth == 0 or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield path, value
    elif isinstance(value, GENERATORS):
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
            yield from leaves(f"{dot}{key}", below, note, seen, depth - 1)
    elif isinstance(value, set):
        note(value)
        yield path, frozenset(value)
    elif isinstance(value, (list, tuple, deque)):
        if not isinstance(value, tuple):
            note(value)
        for place, below in enumerate(value):
            yield from leaves(f"{path}[{place}]", below, note, seen, depth - 1)
    elif isinstance(value, partial):
        yield from leaves(path, [*value.args, value.keywords], note, seen, depth - 1)
    elif _is_record(value):
        note(vars(value))
        for key, below in list(vars(value).items()):
            yield from leaves(f"{path}.{key}", below, note, seen, depth - 1)


def _is_record(value: Any) -> bool:
    """Whether an object keeps data: tensors beside other things, or numbers, containers and text.

    Other objects (a trainer, a logger) lead far from the model, and are not followed.
    """
    attributes = getattr(value, "__dict__", None)
    if attributes is None:
        return False
    return all(map(_is_plain, attributes.values())) or any(map(_has_tensor, attributes.values()))


def _is_plain(value: Any) -> bool:
    plain = (torch.Tensor, np.ndarray, str, bytes, type(None))
    return isinstance(value, (*plain, *_NUMBERS, *_CONTAINERS, *GENERATORS))


def _has_tensor(value: Any) -> bool:
    """Whether a value is a tensor, or a container that has one."""
    inner = value.values() if isinstance(value, dict) else value
    several = inner if isinstance(value, (dict, list, tuple, deque)) else [value]
    return any(isinstance(one, (torch.Tensor, np.ndarray)) for one in several)


def content_of(container: Any) -> Any:
    """What a container holds, to be filled in again by :func:`fill`."""
    if isinstance(container, np.ndarray):
        return container.copy()
    return dict(container) if isinstance(container, dict) else list(container)


def holds(container: Any, content: Any) -> bool:
    """Whether a container holds this content, in the same order."""
    if isinstance(container, np.ndarray):
        return equal(container, content)
    if isinstance(container, dict) and not are_same(container.values(), content.values()):
        return False
    return are_same(container, content)


def are_same(some: Collection[Any], others: Collection[Any]) -> bool:
    """Whether two collections have the very same objects, in the same order."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def fill(container: Any, content: Any) -> None:
    if holds(container, content):
        return
    if isinstance(container, np.ndarray):
        container[...] = content
    elif isinstance(container, dict):
        own = MODULES_OWN if _is_of_module(container) else ()
        for key in [key for key in container if key not in own]:
            del container[key]
        container.update({key: value for key, value in content.items() if key not in own})
    else:
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(content)


def _is_of_module(container: dict[str, Any]) -> bool:
    """Whether a dict is the ``__dict__`` of a module."""
    return isinstance(container, dict) and "_parameters" in container and "_modules" in container


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    return a is b or bool(a == b)


def state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.bit_generator.state


def set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state
