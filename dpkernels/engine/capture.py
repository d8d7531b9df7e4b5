"""Capture: how a layer's activations and backprops reach the engine while the model runs as usual.

Each layer that owns trainable parameters gets an instance ``forward`` that runs the layer's own
forward with those parameters taken out of autograd, and marks the output with a node whose backward
hands (activations, backprops) to the layer's rule. So autograd computes input gradients only, there
is one backward pass, and no ordinary weight gradient is ever formed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from dpkernels.layers.fold import rows_per_sample
from dpkernels.layers.operands import Operand
from dpkernels.layers.rule import Rule


class Sink(Protocol):
    """Where contributions go: the engine's side of the backward pass."""

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


class ModelCapture:
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
        self.probe: Callable[..., None] | None = None
        #: layers and their rows per sample that a trial run has passed; None before the first
        self.tried: set[tuple[str, int]] | None = None
        self._trying = False
        #: what the optimizer holds now (frozen parameters too: they may be unfrozen later)
        self.held: Callable[[], Iterable[nn.Parameter]] | None = None
        self.trained: frozenset[int] = frozenset()
        #: requires gradients, so that a first layer's node is reached at all; not a leaf, so that
        #: a backward pass can be asked whether it is for the parameters
        with torch.enable_grad():
            self.anchor = torch.zeros((), requires_grad=True).clone()
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

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelCapture:
        """A copied model runs as an ordinary one: it has no optimizer to be private with."""
        twin = ModelCapture.__new__(ModelCapture)
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
                ", or the parameter is used outside its module's forward (call the module instead)"
            )

        self._guards[id(parameter)] = parameter.register_hook(refuse)

    def refresh(self) -> None:
        """Follow the optimizer: parameters may have been added or unfrozen; guard them all."""
        parameters = self.root.parameters() if self.held is None else self.held()
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
            samples = rows // self.views if rows % self.views == 0 else 0
        if not samples or rows_per_sample(rows, samples) is None:
            raise NotPerSample(
                f"layer {layer!r}: its input has {rows} rows for {samples} samples, so rows cannot "
                "be assigned to samples. Give it an input whose first axis is the sample axis "
                "(batch_first=False if it is the second), or freeze the layer"
            )
        if samples > 1 and self.tried is not None:
            self._check_tried(layer, rows // samples)
        return samples

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """A trial run is under way; what it meets counts as tried if it passes."""
        before = self.tried
        self.tried, self._trying = set(before or ()), True
        try:
            yield
        except BaseException:
            self.tried = before
            raise
        finally:
            self._trying = False

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


class LayerCall:
    """One call of one layer: everything its backward needs besides the saved tensors."""

    def __init__(self, owner: LayerForward, samples: int, wanted: frozenset[str]):
        self.owner = owner
        self.samples = samples
        self.wanted = wanted

    @contextlib.contextmanager
    def detached(self) -> Iterator[None]:
        """The layer with its trained tensors out of autograd."""
        module = self.owner.module
        with swapped((module, n, own_parameter(module, n).detach()) for n in self.wanted):
            yield

    def backward(self, backprops: torch.Tensor, saved: tuple[torch.Tensor, ...]) -> None:
        owner, sink = self.owner, self.owner.capture.sink
        if sink is None:
            return
        sink.begin(self.samples)
        if owner.axis:
            backprops = backprops.transpose(0, 1)
            saved = tuple(t.transpose(0, 1) for t in saved)
        sink.saw(owner.name, "backprops", backprops, self.samples)
        found = owner.rule.operands(owner.module, saved, backprops, self.samples, self.wanted)
        for name, operand in found:
            for parameter, gradient in self.trace(name, operand):
                sink.add(parameter, gradient, self.samples, owner.name)

    def trace(self, name: str, operand: Operand) -> Iterable[tuple[nn.Parameter, Operand]]:
        """The parameters behind one of the layer's tensors, and what each receives."""
        yield own_parameter(self.owner.module, name), operand


class _Mark(torch.autograd.Function):
    """Identity on a layer's output, in place, whose backward hands the backprops over."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, anchor: torch.Tensor, call: LayerCall, *saved: torch.Tensor
    ) -> torch.Tensor:
        ctx.call = call
        ctx.save_for_backward(*saved)
        ctx.mark_dirty(output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, backprops: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        capture = ctx.call.owner.capture
        if backprops is not None and capture.wants_this_backward():
            ctx.call.backward(backprops.detach(), ctx.saved_tensors)
        return (backprops, *(None for _ in ctx.needs_input_grad[1:]))


def own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """What the module holds under this name, not below it."""
    parameter = module._parameters[name]
    if parameter is None:
        raise ValueError(f"{type(module).__name__}: {name!r} is None, expected a parameter")
    return parameter


@contextlib.contextmanager
def swapped(tensors: Iterable[tuple[nn.Module, str, torch.Tensor]]) -> Iterator[None]:
    """Put tensors in the place of parameters, module by module, and put the parameters back."""
    originals: list[tuple[nn.Module, str, torch.Tensor]] = []
    try:
        for module, name, tensor in tensors:
            originals.append((module, name, own_parameter(module, name)))
            _put(module, name, tensor)
        yield
    finally:
        for module, name, parameter in reversed(originals):
            _put(module, name, parameter)


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module._parameters[name] = tensor  # type: ignore[assignment]
    if isinstance(module, nn.RNNBase):
        module._flat_weights[module._flat_weights_names.index(name)] = tensor


class CapturedForward:
    """An instance ``forward`` that stands before the module's own; copies and pickles with it."""

    def __init__(self, module: nn.Module, name: str, capture: ModelCapture):
        self.module = module
        self.name = name
        self.capture = capture
        self.inner: Callable[..., Any] | None = module.__dict__.get("forward")

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that stood here before."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def install(self) -> None:
        self.module.__dict__["forward"] = self

    def remove(self) -> None:
        if self.module.__dict__.get("forward") is not self:
            return
        if self.inner is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.inner


class LayerForward(CapturedForward):
    """Capture for a layer that has a rule."""

    def __init__(self, module: nn.Module, name: str, capture: ModelCapture, axis: int, rule: Rule):
        super().__init__(module, name, capture)
        self.rule = rule
        self.axis = axis if rule.sample_axis is None else rule.sample_axis

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        capture = self.capture
        sink = capture.open_sink
        if sink is None:
            return self.original(*args, **kwargs)
        wanted = self.wanted()
        if not wanted:
            return self.original(*args, **kwargs)
        if args:
            x, samples = self._rows(args[0])
            args = (x, *args[1:])
        else:
            key = next(k for k, v in kwargs.items() if isinstance(v, torch.Tensor))
            x, samples = self._rows(kwargs[key])
            kwargs = {**kwargs, key: x}
        sink.saw(self.name, "activations", x.movedim(self.axis, 0), samples)
        call = self.call(samples, wanted)
        with call.detached():
            output, saved = self.rule.forward(
                self.module, x, lambda: self.original(*args, **kwargs)
            )
        if output._is_view():
            output = torch.ops.aten._unsafe_view(output, output.shape)
        capture.marked = True
        return _Mark.apply(output, capture.anchor, call, *(t.detach() for t in saved))

    def wanted(self) -> frozenset[str]:
        """Names of the layer's tensors that are trained."""
        return self.capture.wanted(self.module)

    def call(self, samples: int, wanted: frozenset[str]) -> LayerCall:
        """What one call of the layer must remember."""
        return LayerCall(self, samples, wanted)

    def _rows(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The input with a row for every sample, and the number of samples."""
        capture = self.capture
        if not self.rule.batched(self.module, x) or x.ndim <= self.axis:
            raise NotPerSample(
                f"layer {self.name!r} ({type(self.module).__name__}): its input of shape "
                f"{tuple(x.shape)} has no sample axis; give it a batched input, or freeze the layer"
            )
        rows = x.shape[self.axis]
        batch = rows if capture.samples is None else capture.samples * capture.views
        if rows == 1 and batch > 1 and x.ndim > 1:
            shape = list(x.shape)
            shape[self.axis] = rows = batch
            x = x.expand(shape)
        return x, capture.samples_for(rows, self.name)


def is_packed(value: Any) -> bool:
    """Whether a nested value is a PackedSequence, whose tensors belong together."""
    return isinstance(value, PackedSequence)


def leaves_of(tree: Any) -> list[Any]:
    """The leaves of nested arguments or outputs; a PackedSequence is one."""
    return tree_leaves(tree, is_leaf=is_packed)


def refuse_packed(module: nn.Module, name: str, values: Iterable[Any]) -> None:
    """Raise where an argument is a PackedSequence: its rows are steps, not samples."""
    if any(isinstance(value, PackedSequence) for value in values):
        raise NotPerSample(
            f"module {name!r} ({type(module).__name__}): a PackedSequence interleaves the steps of "
            "all samples; pass the padded tensor"
        )
