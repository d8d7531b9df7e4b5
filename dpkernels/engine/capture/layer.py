"""How a layer's activations and backprops reach the engine while the model runs as usual.

Each layer that owns trainable parameters gets an instance ``forward`` that runs the layer's own
forward with those parameters taken out of autograd, and marks the output with a node whose backward
hands (activations, backprops) to the layer's rule. So autograd computes input gradients only, there
is one backward pass, and no ordinary weight gradient is ever formed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from dpkernels.engine.capture.refusals import NotPerSample, refuse_transformed
from dpkernels.engine.capture.session import Session, Sink
from dpkernels.layers.fold import sum_rows
from dpkernels.layers.mark import mark
from dpkernels.layers.operands import Operand, StoredOperand
from dpkernels.layers.rule import CapturedCall, Rule
from dpkernels.ops.precision import full_precision

#: a module, the name of one of its parameters, the parameter
Slot = tuple[nn.Module, str, nn.Parameter]


class LayerCall:
    """One call of one layer: everything its backward needs besides the saved tensors.

    Attributes:
        owner: the layer's captured forward.
        samples: number of samples.
        wanted: names of the trained tensors whose gradients the layer's rule makes.
    """

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

    def for_each(self, name: str, rows: int) -> torch.Tensor:
        """[rows, *shape]: one of the layer's tensors, once for every row of the layer's input.

        The gradient that autograd finds for a trained tensor goes to the sink.
        """
        value = getattr(self.owner.module, name).detach()
        if name not in self.wanted:
            return value.expand(rows, *value.shape)
        self.wanted -= {name}
        anchor = self.owner.session.anchor
        return OncePerSample.apply(anchor, value, functools.partial(self._receive_rows, name), rows)

    def _receive_rows(self, name: str, grad_rows: torch.Tensor) -> None:
        """Hand on the gradient of one of the layer's tensors for each row, [rows, *shape]."""
        sink = self.owner.session.receiving_sink(self.samples)
        if sink is not None:
            self._hand_on(sink, name, StoredOperand(sum_rows(grad_rows, self.samples)))

    def receive(self, backprops: torch.Tensor, saved: Sequence[torch.Tensor]) -> None:
        """Hand on what the rule makes of backprops and saved tensors."""
        owner = self.owner
        sink = owner.session.receiving_sink(self.samples)
        if sink is None:
            return
        if owner.axis:
            backprops = backprops.transpose(0, 1)
            saved = [t.transpose(0, 1) for t in saved]
        with full_precision():
            sink.saw(owner.name, "backprops", backprops, self.samples)
            if self.wanted and sink.trains:
                call = CapturedCall(
                    owner.module, tuple(saved), backprops, self.samples, self.wanted
                )
                for name, operand in owner.rule.operands(call):
                    if name not in self.wanted:
                        refuse_unwanted(owner, owner.rule, name)
                    self._hand_on(sink, name, operand)

    def _hand_on(self, sink: Sink, name: str, operand: Operand) -> None:
        for parameter, gradient in self.trace(name, operand):
            sink.add(parameter, gradient, self.samples, self.owner.name)

    def trace(self, name: str, operand: Operand) -> Iterable[tuple[nn.Parameter, Operand]]:
        """The parameters behind one of the layer's tensors, each with its operand."""
        yield own_parameter(self.owner.module, name), operand


def refuse_unwanted(owner: CapturedForward, rule: object, parameter: str) -> None:
    """Raise: a rule has returned an operand for a parameter that is not trained in the call."""
    raise NotPerSample(
        f"layer {owner.name!r} ({type(owner.module).__name__}): {type(rule).__name__} returns an "
        f"operand for {parameter!r}, which the call does not train, so a gradient that nobody gets "
        "would count in the samples' norms; return operands for wanted parameters only"
    )


class OncePerSample(torch.autograd.Function):
    """[*shape] -> [B, *shape]: a parameter, once for every sample; the gradient is handed over."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        value: torch.Tensor,
        receive: Callable[[torch.Tensor], None],
        samples: int,
    ) -> torch.Tensor:
        ctx.receive = receive
        ctx.set_materialize_grads(False)
        return value.expand(samples, *value.shape)

    @staticmethod
    def backward(ctx: Any, grad_sample: torch.Tensor | None) -> tuple[None, ...]:
        if grad_sample is not None:
            with full_precision():
                ctx.receive(grad_sample.detach())
        return (None, None, None, None)


def own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The module's own parameter of this name."""
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
    """An instance ``forward`` before the module's own, copied and pickled with the module."""

    def __init__(self, module: nn.Module, name: str, session: Session):
        self.module = module
        self.name = name
        self.session = session
        self.inner: Callable[..., Any] | None = module.__dict__.get("forward")

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward that was the module's before :meth:`install`."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def slots(self, modules: Iterable[nn.Module]) -> list[Slot]:
        """The trained parameters that the modules own; a tied one in every place."""
        return [
            (module, name, own_parameter(module, name))
            for module in modules
            for name in sorted(self.session.guards.wanted(module))
        ]

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

    def __init__(self, module: nn.Module, name: str, session: Session, axis: int, rule: Rule):
        super().__init__(module, name, session)
        self.rule = rule
        self.axis = axis if rule.sample_axis is None else rule.sample_axis

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        sink = session.open_sink
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
            output = self.rule.forward_each(self.module, x, call.for_each)
            saved: tuple[torch.Tensor, ...] = ()
            if output is None:
                output, saved = self.rule.forward(
                    self.module, x, lambda: self.original(*args, **kwargs)
                )
        return mark(output, session.anchor, call.receive, *saved)

    def wanted(self) -> frozenset[str]:
        """Names of the layer's tensors that are trained."""
        return self.session.guards.wanted(self.module)

    def call(self, samples: int, wanted: frozenset[str]) -> LayerCall:
        """A record of one call of the layer."""
        return LayerCall(self, samples, wanted)

    def _rows(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The input with a row for every sample, and the number of samples."""
        session = self.session
        refuse_transformed(x, f"layer {self.name!r} ({type(self.module).__name__})")
        if not self.rule.batched(self.module, x) or x.ndim <= self.axis:
            raise NotPerSample(
                f"layer {self.name!r} ({type(self.module).__name__}): its input of shape "
                f"{tuple(x.shape)} has no sample axis; give it a batched input, or freeze the layer"
            )
        rows = x.shape[self.axis]
        batch = rows if session.batch is None else session.batch.rows
        if rows == 1 and batch > 1 and x.ndim > 1:
            shape = list(x.shape)
            shape[self.axis] = rows = batch
            x = x.expand(shape)
        return x, session.samples_for(rows, self.name, x.ndim)


def is_packed(value: Any) -> bool:
    """Whether a nested value is a PackedSequence, whose tensors belong together."""
    return isinstance(value, PackedSequence)


def leaves_of(tree: Any) -> list[Any]:
    """The leaves of nested arguments or outputs; a PackedSequence is one."""
    return tree_leaves(tree, is_leaf=is_packed)
