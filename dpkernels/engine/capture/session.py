"""Capture: what the captured layers of one model share, and where their contributions go.

Layers themselves are captured in :mod:`dpkernels.engine.capture.layer`.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpkernels.layers.fold import rows_per_sample
from dpkernels.layers.operands import Operand


class Sink(Protocol):
    """Where contributions go: the engine's side of the backward pass."""

    #: whether passes that end here train the model; not so in a trial run or a stand-in pass
    trains: bool

    @property
    def samples(self) -> int | None:
        """Number of samples of the backward pass under way, None outside one."""

    def reset(self) -> None:
        """Forget a backward pass that failed half-way."""

    def begin(self, samples: int) -> None:
        """A backward pass over `samples` samples is under way."""

    def saw(self, layer: str, kind: str, rows: torch.Tensor, samples: int) -> None:
        """A layer's activations or backprops, sample axis first, as they pass by."""

    def add(self, parameter: nn.Parameter, operand: Operand, samples: int, layer: str) -> None:
        """One parameter's contribution from one call of one layer."""


class NotPerSample(ValueError):
    """No per-sample gradient can be told apart; the message names the module and the remedy."""


class Untried(NotPerSample):
    """A layer met rows that no trial run has met: try this batch too."""


class Session:
    """What the captured layers of one model share: batch geometry, switches, and the sink.

    Args:
        root: the model.
        batch_first: the sample axis is 0 if True, 1 if False.
        views_per_sample: rows per sample at the model's input.
    """

    def __init__(self, root: nn.Module, *, batch_first: bool = True, views_per_sample: int = 1):
        self.root = root
        self.axis = 0 if batch_first else 1
        self.views = views_per_sample
        self.names = {id(p): name for name, p in root.named_parameters()}
        self._start()

    def _start(self) -> None:
        """The state of a run: what a copy or a restored pickle begins anew."""
        self.sink: Sink | None = None
        self.samples: int | None = None
        self.empty = False
        self.probe: Callable[..., bool] | None = None
        #: layers and their rows per sample that a trial run has passed; None before the first
        self.tried: set[tuple[str, int]] | None = None
        #: samples of the largest batch that a trial run has passed
        self.tried_on = 0
        #: a layer that had several rows per sample in a forward pass before any trial run
        self.folded: str | None = None
        self._trying = False
        #: what the optimizer holds now (frozen parameters too: they may be unfrozen later)
        self.held: Callable[[], Iterable[nn.Parameter]] | None = None
        self.trained: frozenset[int] = frozenset()
        self.place_anchor(torch.device("cpu"))
        self._held: tuple[tuple[int, bool], ...] | None = None
        self._batch_norms: list[nn.Module] = []
        #: whether a layer of the forward pass under way is in its graph (not so inside a
        #: reentrant checkpoint)
        self.marked = False
        self._depth = 0
        self._guards: dict[int, Any] = {}
        #: under FSDP2, by module (its id) and name: the sharded parameter that the optimizer holds
        self.sharded: dict[tuple[int, str], nn.Parameter] = {}
        self._gathered: dict[nn.Parameter, nn.Parameter] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """A copied model runs as an ordinary one: it has no optimizer to be private with."""
        twin = Session.__new__(Session)
        memo[id(self)] = twin
        twin.__setstate__(self.__getstate__())
        twin.root = copy.deepcopy(self.root, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("root", "axis", "views", "names")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def open_sink(self) -> Sink | None:
        """The sink while layers capture; None where something around has switched that off."""
        return self.sink if self._depth == 0 and torch.is_grad_enabled() else None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run layers as they are: evaluation, or inside a unit that captures for them."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def wants_this_backward(self) -> bool:
        """Whether the backward pass under way is for the parameters.

        ``torch.autograd.grad(output, inputs)`` is for something else (saliency, an adversarial
        example) and passes by. One that can be differentiated again is refused.
        """
        if torch.is_grad_enabled():
            raise NotPerSample(
                "create_graph=True: the second derivative would reach the parameters around "
                "capture, so its per-sample gradients are unknown; drop create_graph"
            )
        node = self.anchor.grad_fn
        return node is not None and torch._C._will_engine_execute_node(node)

    def wanted(self, module: nn.Module) -> frozenset[str]:
        """Names of the module's own parameters that are trained."""
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
        """What the optimizer holds of a parameter as its module has it: under FSDP2, its shard."""
        return self._gathered.get(parameter, parameter)

    def _guard(self, parameter: nn.Parameter) -> None:
        """Refuse a gradient that reaches the parameter by a way around capture."""
        if id(parameter) in self._guards or not parameter.is_leaf:
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

        self._guards[id(parameter)] = parameter.register_hook(refuse)

    def place_anchor(self, device: torch.device) -> None:
        """Make the tensor that every captured layer's node hangs on.

        It requires gradients, so that a first layer's node is reached at all; it is no leaf, so
        that a backward pass can be asked whether it is for the parameters; and the leaf behind it
        is where the parameters are: only then does autograd end the pass on the streams from which
        ``backward()`` was called (no parameter of a private model is a leaf of the graph).
        """
        with torch.enable_grad():
            self.anchor = torch.zeros((), device=device, requires_grad=True).clone()

    def refresh(self) -> None:
        """Follow the optimizer: parameters may have been added or unfrozen; guard them all."""
        parameters = list(self.root.parameters() if self.held is None else self.held())
        device = next((p.device for p in parameters if p.is_cuda), self.anchor.device)
        if device != self.anchor.device:
            self.place_anchor(device)
        held = tuple((id(p), p.requires_grad) for p in parameters)
        if held == self._held:
            return
        self._held = held
        self._batch_norms = [m for m in self.root.modules() if isinstance(m, _BatchNorm)]
        self.trained = frozenset(key for key, _ in held)
        for module in self.root.modules():
            self.wanted(module)

    def check_batch_norms(self) -> None:
        """Refuse a batch normalisation that ``model.train()`` has thawed since make_private()."""
        for module in self._batch_norms:
            if module.training:
                name = next(n for n, m in self.root.named_modules() if m is module)
                raise NotPerSample(
                    f"module {name!r} ({type(module).__name__}): it is in training mode now and "
                    "normalises over the batch, so samples mix; call .eval() on it after every "
                    "model.train(), or use GroupNorm"
                )

    def release(self) -> None:
        """Take the guards off."""
        for handle in self._guards.values():
            handle.remove()
        self._guards.clear()

    def samples_for(self, rows: int, layer: str) -> int:
        """The number of samples behind `rows` rows of a layer."""
        samples = self.samples or (self.sink.samples if self.sink is not None else None)
        if samples is None:
            self.check_batch_norms()
            warnings.warn(
                f"layer {layer!r} was called outside the model's forward, where no trial run can "
                "tell whether samples mix: its rows are taken for samples. Call the model instead",
                stacklevel=2,
            )
            samples = rows // self.views if rows % self.views == 0 else 0
        if not samples or rows_per_sample(rows, samples) is None:
            raise NotPerSample(
                f"layer {layer!r}: its input has {rows} rows for {samples} samples, so rows cannot "
                "be assigned to samples. Give it an input whose first axis is the sample axis "
                "(batch_first=False if it is the second), or freeze the layer"
            )
        if samples > 1 and self.tried is not None:
            self._check_tried(layer, rows // samples)
        elif samples > 1 and self.probe is not None and rows > samples * self.views:
            self.folded = layer
        return samples

    def due(self) -> bool:
        """Whether the batch under way calls for a trial run: the first with two samples, and the
        first with three, as one of two is all alike once a sample has taken the other's place."""
        return self.samples is not None and min(self.samples, 3) > max(self.tried_on, 1)

    def trial(self, probe: Callable[..., bool], *batch: Any) -> None:
        """A trial run; what it meets counts as tried if it passes on a batch that can tell."""
        before = self.tried
        self.tried, self._trying = set(before or ()), True
        told = False
        try:
            told = probe(self, *batch)
        finally:
            self._trying = False
            if not told:
                self.tried = before
        if told:
            self.tried_on = max(self.tried_on, self.samples or 0)

    def _check_tried(self, layer: str, count: int) -> None:
        """Raise where a layer has another number of rows per sample than in any trial run."""
        if self.tried is None or (layer, count) in self.tried:
            return
        if self._trying:
            self.tried.add((layer, count))
        elif count > 1 or any(other == layer for other, _ in self.tried):
            raise Untried(
                f"layer {layer!r}: it has {count} rows for each sample, which it had in no trial "
                "run, so which rows are whose is unknown; let it see the same rows whenever it is "
                "called, and use checkpoint(use_reentrant=False)"
            )
