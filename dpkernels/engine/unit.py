"""The generic fallback: a module that owns parameters no rule knows, with everything below it.

The unit's forward runs once per sample under ``torch.func.vmap`` with each trained parameter
expanded along the samples; ordinary autograd then returns per-sample gradients. What vmap cannot
trace (data-dependent control flow, recurrent kernels) runs as a loop over samples, which is the
definition itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from dpkernels.engine.capture import CapturedForward, ModelCapture, NotPerSample, swapped
from dpkernels.layers.operands import StoredOperand
from dpkernels.layers.sequence import sample_axes


class _PerSample(torch.autograd.Function):
    """[*shape] -> [B, *shape]: a parameter, once for every sample."""

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
            ctx.receive(grad_sample.detach())
        return (None, None, None, None)


#: a module, the name of one of its parameters, the parameter
Slot = tuple[nn.Module, str, nn.Parameter]


@dataclass(frozen=True)
class UnitCall:
    """One call of a unit, taken apart: its leaves, the sample axis of each, and how to repeat it."""

    leaves: list[Any]
    axes: list[int | None]
    run: Callable[[list[Any]], Any]
    samples: int

    @property
    def rows(self) -> int:
        """Rows of its batched tensors."""
        return next(t.shape[a] for t, a in zip(self.leaves, self.axes) if a is not None)

    def first(self, samples: int) -> UnitCall:
        """The call with the first `samples` samples only."""
        return self._part(0, samples)

    def only(self, sample: int) -> UnitCall:
        """The call with one sample only."""
        return self._part(sample, 1)

    def _part(self, start: int, samples: int) -> UnitCall:
        leaves = []
        for leaf, axis in zip(self.leaves, self.axes):
            if axis is not None:
                each = leaf.shape[axis] // self.samples
                leaf = leaf.narrow(axis, start * each, samples * each)
            leaves.append(leaf)
        return UnitCall(leaves, self.axes, self.run, samples)

    def inputs(self) -> list[torch.Tensor]:
        """The batched leaves, [samples, ..., rows per sample at the sample axis, ...]."""
        return [
            leaf.unflatten(axis, (self.samples, -1)).movedim(axis, 0)
            for leaf, axis in zip(self.leaves, self.axes)
            if axis is not None
        ]

    def with_inputs(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The leaves with others in the place of the batched ones."""
        values = iter(tensors)
        return [
            leaf if axis is None else next(values) for leaf, axis in zip(self.leaves, self.axes)
        ]


class UnitForward(CapturedForward):
    """Capture for a module without a rule, sample by sample, over its whole subtree."""

    def __init__(self, module: nn.Module, name: str, capture: ModelCapture, axis: int):
        super().__init__(module, name, capture)
        self.axis = axis
        self.loop_reason: str | None = None
        #: by the numbers of axes of the outputs of one sample: the sample axis of each output
        self._output_axes: dict[tuple[int, ...], list[int | None]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        capture = self.capture
        slots = self._slots() if capture.recording else []
        if not slots:
            return self.original(*args, **kwargs)
        call = self._take_apart(args, kwargs)
        for leaf, axis in zip(call.leaves, call.axes):
            if axis is not None:
                capture.sink.saw(self.name, "activations", leaf.movedim(axis, 0), call.samples)
        parameters = {id(p): self._per_sample(p, call.samples) for _, _, p in slots}
        capture.marked = True
        outputs, others, spec = self._outputs(call, slots, parameters)
        merged = (_merge(t, axis) for t, axis in zip(outputs, self._axes_of(outputs, call, slots)))
        return tree_unflatten([next(merged) if o is None else o[0] for o in others], spec)

    def _outputs(
        self,
        call: UnitCall,
        slots: list[Slot],
        parameters: dict[int, torch.Tensor],
    ) -> tuple[list[torch.Tensor], list[tuple[Any] | None], Any]:
        """Tensors of all samples, [samples, ...]; what else is returned; the nesting of both."""
        others: list[tuple[Any] | None] = []
        spec: Any = None

        def one_sample(
            parameters: dict[int, torch.Tensor], tensors: list[torch.Tensor]
        ) -> list[torch.Tensor]:
            nonlocal others, spec
            with swapped((m, n, parameters[id(p)]) for m, n, p in slots), self.capture.paused():
                flat, spec = tree_flatten(call.run(call.with_inputs(tensors)))
            others = [None if isinstance(t, torch.Tensor) else (t,) for t in flat]
            return [t for t in flat if isinstance(t, torch.Tensor)]

        return self._run(one_sample, parameters, call.inputs(), call.samples), others, spec

    def _take_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UnitCall:
        try:
            known = sample_axes(self.module, args, kwargs, self.axis)
        except ValueError as error:
            raise NotPerSample(
                f"module {self.name!r} ({type(self.module).__name__}): {error}"
            ) from None
        if known is not None:
            named, axis_of = known
            per_name = {name: tree_flatten(value) for name, value in named.items()}
            pairs = [(name, leaf) for name, (flat, _) in per_name.items() for leaf in flat]
            leaves = [leaf for _, leaf in pairs]
            spec = tree_flatten(named)[1]
            axes = [axis_of(n, t) if isinstance(t, torch.Tensor) else None for n, t in pairs]
            rows = next(t.shape[a] for t, a in zip(leaves, axes) if a is not None)

            def run(values: list[Any]) -> Any:
                return self.original(**tree_unflatten(values, spec))
        else:
            leaves, spec = tree_flatten((args, kwargs))
            rows = self._rows(leaves)
            axes = [
                self.axis
                if isinstance(t, torch.Tensor) and t.ndim > self.axis and t.shape[self.axis] == rows
                else None
                for t in leaves
            ]

            def run(values: list[Any]) -> Any:
                arguments, keywords = tree_unflatten(values, spec)
                return self.original(*arguments, **keywords)

        return UnitCall(leaves, axes, run, self.capture.samples_for(rows, self.name))

    def _axes_of(
        self,
        outputs: list[torch.Tensor],
        call: UnitCall,
        slots: list[Slot],
    ) -> list[int | None]:
        """The sample axis of each output, found out by the first call that has two samples."""
        if call.samples == 1:
            return [None] * len(outputs)
        shape = tuple(t.ndim for t in outputs)
        if shape not in self._output_axes:
            self._output_axes[shape] = self._verify(call, slots)
        return self._output_axes[shape]

    def _verify(self, call: UnitCall, slots: list[Slot]) -> list[int | None]:
        """The sample axis of each output; refuses a unit that is not its samples put together."""
        with torch.no_grad(), deterministic(self.module), self.capture.paused():
            whole = [t for t in tree_leaves(call.run(call.leaves)) if isinstance(t, torch.Tensor)]
            plain = {id(p): p.expand(call.samples, *p.shape) for _, _, p in slots}
            apart, _, _ = self._outputs(call, slots, plain)
        axes = [_axis_between(a, w, self.axis) for a, w in zip(apart, whole, strict=True)]
        if _APART in axes:
            raise NotPerSample(
                f"module {self.name!r} ({type(self.module).__name__}): its output for the batch is "
                "not what it returns sample by sample, so it couples samples or has them on another "
                "axis. Give it inputs with the sample axis first (batch_first=True), or freeze it"
            )
        return axes

    def _per_sample(self, parameter: nn.Parameter, samples: int) -> torch.Tensor:
        """[samples, *shape]: the parameter expanded; its gradient goes to the sink."""

        def receive(grad_sample: torch.Tensor) -> None:
            sink = self.capture.sink
            if sink is not None and self.capture.wants_this_backward():
                sink.begin(samples)
                sink.add(parameter, StoredOperand(grad_sample), samples, self.name)

        return _PerSample.apply(self.capture.anchor, parameter.detach(), receive, samples)

    def _slots(self) -> list[Slot]:
        """Every place below the unit where a trained parameter sits."""
        return [
            (module, name, module._parameters[name])
            for module in self.module.modules()
            for name in sorted(self.capture.wanted(module))
        ]

    def _rows(self, leaves: list[Any]) -> int:
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.ndim > self.axis:
                return leaf.shape[self.axis]
        raise NotPerSample(
            f"module {self.name!r} ({type(self.module).__name__}) owns parameters and takes no "
            "batched tensor, so its samples cannot be told apart; pass it the batch, or freeze it"
        )

    def _run(
        self,
        one_sample: Callable[..., list[torch.Tensor]],
        parameters: dict[int, torch.Tensor],
        inputs: list[torch.Tensor],
        samples: int,
    ) -> list[torch.Tensor]:
        if samples > 1 and self.loop_reason is None:
            try:
                vectorised = torch.func.vmap(one_sample, in_dims=(0, 0), randomness="different")
                return vectorised(parameters, inputs)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                self.loop_reason = str(error).splitlines()[0]
        split = {key: value.unbind(0) for key, value in parameters.items()}
        rows = [
            one_sample({key: value[b] for key, value in split.items()}, [t[b] for t in inputs])
            for b in range(samples)
        ]
        return [torch.stack(column) for column in zip(*rows)]


#: no axis puts the samples' outputs together to the batch's output
_APART = -1
#: the samples' outputs stand side by side already (a ``squeeze`` took their own axis away)
_STACKED = -2


def _merge(output: torch.Tensor, axis: int | None) -> torch.Tensor:
    """[samples, ...] -> the batch's output, whose sample axis is `axis` (None: it has none)."""
    if axis == _STACKED:
        return output
    return output[0] if axis is None else output.movedim(0, axis).flatten(axis, axis + 1)


def _axis_between(apart: torch.Tensor, whole: torch.Tensor, first: int) -> int | None:
    """The axis on which `whole` holds the samples of `apart`; None if they are all `whole`."""
    axes = sorted(range(apart.ndim - 1), key=lambda axis: axis != first)
    for axis in axes:
        if _same(_merge(apart, axis), whole):
            return axis
    if _same(apart, whole):
        return _STACKED
    constant = all(_same(one, whole) for one in apart)
    return None if constant and not whole.is_floating_point() else _APART


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and _close(a, b)


@contextlib.contextmanager
def deterministic(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, on the path that training takes: no dropout, no statistics."""
    modes = [(m, m.training) for m in module.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for m, _ in modes:
            m.training = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for m, training in modes:
            m.training = training


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    tolerance = 1e-9 if a.dtype == torch.float64 else 1e-3 if a.dtype == torch.float32 else 3e-2
    scale = float(b.double().abs().max()) if b.numel() else 0.0
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * scale)
