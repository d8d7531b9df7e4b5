"""Which parameters are trained, and the hooks that refuse an ordinary gradient for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpkernels.engine.capture.refusals import NotPerSample


class Guards:
    """The trained parameters of a model, each with a hook that refuses an ordinary gradient.

    Attributes:
        names: by a parameter's id, the parameter's name.
        held: returns the parameters that the optimizer holds now, frozen ones too (they may be
            unfrozen later). None: no optimizer is connected.
        trained: ids of the parameters that the optimizer held at the last :meth:`refresh`.
        sharded: under FSDP2, by a module's id and a name, the shard that the optimizer holds.
    """

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.held: Callable[[], Iterable[nn.Parameter]] | None = None
        self.trained: frozenset[int] = frozenset()
        self.sharded: dict[tuple[int, str], nn.Parameter] = {}
        #: by a parameter that FSDP2 has gathered, its shard
        self._gathered: dict[nn.Parameter, nn.Parameter] = {}
        self._handles: dict[int, Any] = {}
        #: id and requires_grad of each held parameter at the last refresh that found a change
        self._snapshot: tuple[tuple[int, bool], ...] | None = None
        self._batch_norms: list[tuple[str, nn.Module]] = []

    def refresh(self, root: nn.Module) -> list[nn.Parameter]:
        """Follow the optimizer, whose parameters may have been added or unfrozen: guard them all.

        Returns:
            The parameters that the optimizer holds.
        """
        parameters = list(root.parameters() if self.held is None else self.held())
        snapshot = tuple((id(p), p.requires_grad) for p in parameters)
        if snapshot != self._snapshot:
            self._snapshot = snapshot
            self.names.update((id(p), name) for name, p in root.named_parameters())
            self._batch_norms = [
                (n, m) for n, m in root.named_modules() if isinstance(m, _BatchNorm)
            ]
            self.trained = frozenset(key for key, _ in snapshot)
            for module in root.modules():
                self.wanted(module)
        return parameters

    def wanted(self, module: nn.Module) -> frozenset[str]:
        """Names of the module's own parameters that are trained, each guarded from now on."""
        names = []
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            held = self.sharded.get((id(module), name), parameter)
            if id(held) in self.trained:
                if held is not parameter:
                    self._gathered[parameter] = held
                self._guard(parameter)
                names.append(name)
        return frozenset(names)

    def held_as(self, parameter: nn.Parameter) -> nn.Parameter:
        """The optimizer's parameter behind a module's: under FSDP2, the shard."""
        return self._gathered.get(parameter, parameter)

    def _guard(self, parameter: nn.Parameter) -> None:
        """Refuse a gradient that reaches the parameter by a way around capture."""
        if id(parameter) in self._handles or not parameter.is_leaf:
            return
        name = self.names.get(id(self.held_as(parameter)), "?")

        def refuse(grad: torch.Tensor) -> None:
            raise NotPerSample(
                f"parameter {name!r}: an ordinary gradient reached it, so its samples are mixed "
                "and nothing would clip it. Either the model ran in eval mode (call model.train())"
                ", or the parameter is used outside its module's forward (call the module instead; "
                "the optimizer's weight_decay for a penalty on weights), or its module was added "
                "after make_private() (call it again)"
            )

        self._handles[id(parameter)] = parameter.register_hook(refuse)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def check_batch_norms(self) -> None:
        """Refuse a batch normalisation that ``model.train()`` has thawed since make_private()."""
        for name, module in self._batch_norms:
            if module.training:
                raise NotPerSample(
                    f"module {name!r} ({type(module).__name__}): it is in training mode now and "
                    "normalises over the batch, so samples mix; call .eval() on it after every "
                    "model.train(), or use GroupNorm"
                )
