"""What a model keeps between forward passes: buffers, and tensors and numbers in attributes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dpkernels import ops
from dpkernels.engine.trial import attributes

#: a module's dicts of hooks, which a model may add at its first forward pass
_HOOKS = tuple(key for key in vars(nn.Module()) if "_hooks" in key and "state_dict" not in key)
#: a tensor, and its version
Mark = tuple[weakref.ref[torch.Tensor], int]


class KeptState:
    """What a model keeps, as it was when this object was made; a trial puts it back.

    Tensors, numbers and random number generators in attributes of the model's modules, also inside
    lists, dicts, sets, deques, tuples, partial functions, and inside objects that keep nothing else
    or hold a tensor. Other objects are left alone: one may lead to a whole data set, and FSDP keeps
    in its own that parameters are sharded.

    Args:
        root: the model.
        parameters: names of parameters that count as state, since forward passes write them. One
            replaced by another parameter counts as well; None: no parameter does.
    """

    def __init__(self, root: nn.Module, parameters: Collection[str] | None = None):
        self.root = root
        self._modules = list(root.modules())
        self._parameters = parameters
        self._held = dict(root.named_parameters(remove_duplicate=False))
        #: each container with its content
        self._contents: list[tuple[Any, Any]] = []
        #: by name, a number or tensor
        self._values: dict[str, Any] = {}
        self._copies: dict[int, _Copy] = {}
        self._generators: list[tuple[Any, Any]] = []
        for name, value in self._walk(self._note):
            if isinstance(value, torch.Tensor):
                self._copies.setdefault(id(value), _Copy(value))
            self._values[name] = value

    def put_back(self) -> None:
        """Give the model back what it kept."""
        for container, content in self._contents:
            attributes.fill(container, content)
        with torch.no_grad():
            for copy in self._copies.values():
                copy.put_back()
        for generator, state in self._generators:
            attributes.set_state(generator, state)

    def changed(self) -> dict[str, Any]:
        """By name, the tensors (detached copies) and numbers that are not as they were."""
        found: dict[str, Any] = {}
        if self._untouched():
            return found
        for name, value in self._walk(lambda container: None):
            was = self._values.get(name)
            if isinstance(value, torch.Tensor):
                kept = self._copies.get(id(value))
                if was is not value or kept is None or kept.written():
                    found[name] = value.detach().clone()
            elif name not in self._values or not attributes.equal(was, value):
                found[name] = value
        return found

    def floats(self, names: Iterable[str]) -> set[str]:
        """Those of some names that :meth:`spoil` can make NaN."""
        return {
            name
            for name in names
            if (isinstance(value := self._values.get(name), torch.Tensor) and _is_float(value))
            or (isinstance(value, float) and self._owner(name) is not None)
        }

    def spoil(self, names: Iterable[str]) -> None:
        """Make floats that the model keeps NaN; a pass that reads them shows it."""
        for name in self.floats(names):
            value = self._values[name]
            if isinstance(value, torch.Tensor):
                value.detach().fill_(torch.nan)
            else:
                self._owner(name).__dict__[name.rpartition(".")[2]] = math.nan

    def _owner(self, name: str) -> nn.Module | None:
        """The module that has an attribute of this name."""
        module, _, key = name.rpartition(".")
        owner = dict(self.root.named_modules()).get(module)
        return owner if owner is not None and key in vars(owner) else None

    def _untouched(self) -> bool:
        """Whether every container holds the very objects that it held, and no tensor was written.

        Most passes touch nothing, and looking at what containers hold by name takes longer.
        """
        return (
            attributes.are_same(list(self.root.modules()), self._modules)
            and all(attributes.holds(container, content) for container, content in self._contents)
            and not any(copy.written() for copy in self._copies.values())
        )

    def marks(self) -> dict[str, Mark]:
        """By name, what tells whether a tensor is still the same and was not written since."""
        return {
            name: (weakref.ref(value), _version(value))
            for name, value in self._values.items()
            if isinstance(value, torch.Tensor)
        }

    def _note(self, container: Any) -> None:
        if isinstance(container, attributes.GENERATORS):
            self._generators.append((container, attributes.state_of(container)))
        else:
            self._contents.append((container, attributes.content_of(container)))

    def _walk(self, note: Callable[[Any], None]) -> Iterator[tuple[str, Any]]:
        """Tensors and numbers by name; `note` is called on every container and generator."""
        seen: set[int] = set()
        modules = dict(self.root.named_modules())
        seen |= {id(module) for module in modules.values()}
        while modules:
            name = next(iter(modules))
            module = modules.pop(name)
            prefix = f"{name}." if name else ""
            note(vars(module))
            if self._parameters is not None:
                note(module._parameters)
                for key, parameter in module._parameters.items():
                    path = f"{prefix}{key}"
                    is_state = path in self._parameters or self._held.get(path) is not parameter
                    if parameter is not None and is_state:
                        yield path, parameter
            for key in _HOOKS:
                if vars(module).get(key) is not None:
                    note(vars(module)[key])
            for key, value in list(vars(module).items()):
                if key in attributes.MODULES_OWN:
                    continue
                path = prefix if key == "_buffers" else f"{prefix}{key}"
                for below, leaf in attributes.leaves(path, value, note, seen):
                    if isinstance(leaf, nn.Module):  # in a list, say, unseen by parameters()
                        inside = leaf.named_modules(prefix=below)
                        new = {n: m for n, m in inside if m is leaf or id(m) not in seen}
                        seen |= {id(m) for m in new.values()}
                        modules |= new
                    else:
                        yield below, leaf


def parameter_fingerprints(root: nn.Module) -> dict[str, torch.Tensor]:
    """By name, sums of bit patterns that tell whether a parameter was written: its memory is not
    copied, as a frozen backbone may be large."""
    return {
        name: ops.fingerprint(parameter.detach().reshape(1, -1))[0]
        for name, parameter in root.named_parameters()
        if parameter.numel() and parameter.layout == torch.strided
    }


class _Copy:
    """A tensor, its memory, and a copy of its values.

    What is written through ``tensor.data``, or through an array that shares memory, does not count
    in the tensor's version: values are compared.
    """

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self._memory = tensor, tensor.detach()
        self._values, self._at = self._memory.clone(), _version(tensor)

    def written(self) -> bool:
        """Whether the tensor has other values, or other memory."""
        if self.tensor.layout != torch.strided:  # sparse ones cannot be compared
            return _version(self.tensor) != self._at
        moved = self.tensor.data_ptr() != self._memory.data_ptr()
        return moved or not torch.equal(self.tensor.detach(), self._values)

    def put_back(self) -> None:
        """Give the tensor its memory and values back."""
        if self.written():
            self.tensor.data = self._memory
            self._memory.copy_(self._values)
            self._at = _version(self.tensor)


def written(before: Mapping[str, Mark], after: Mapping[str, Mark]) -> set[str]:
    """Names of tensors that were written, or replaced by others, between two times."""
    return {
        name
        for name, (tensor, version) in before.items()
        if name in after and (tensor() is not after[name][0]() or version != after[name][1])
    }


def published_as(root: nn.Module, name: str) -> str | None:
    """What a name of :class:`KeptState` is in the model's state dict, "buffer" or "parameter"."""
    module, _, key = name.rpartition(".")
    try:
        owner = root.get_submodule(module)
    except AttributeError:
        return None
    if key in owner._buffers:
        return "buffer"
    return "parameter" if key in owner._parameters else None


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
