"""The generic fallback: a unit is a module that owns parameters no rule knows, with its subtree.

The unit's forward runs once per sample under ``torch.func.vmap`` with each trained parameter
expanded along the samples; ordinary autograd then returns per-sample gradients. A unit that raises
anything under vmap (data-dependent control flow, recurrent kernels) runs as a loop over samples,
which is the definition of a per-sample gradient itself.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import _StopRecomputationError

from dpkernels.engine.capture.argument_copies import argument_copy
from dpkernels.engine.capture.layer import (
    CapturedForward,
    OncePerSample,
    Slot,
    is_packed,
    swapped,
)
from dpkernels.engine.capture.refusals import NotPerSample
from dpkernels.engine.capture.session import Session, Sink
from dpkernels.layers.operands import StoredOperand
from dpkernels.layers.sequence import sample_axes


@dataclass(frozen=True)
class UnitCall:
    """One call of a unit, taken apart.

    Attributes:
        leaves: the leaves of the call's nested arguments.
        axes: each leaf's sample axis, None for a leaf that is the same for every sample.
        run: calls the unit on leaves.
        samples: number of samples.
    """

    leaves: list[Any]
    axes: list[int | None]
    run: Callable[[list[Any]], Any]
    samples: int

    @property
    def rows(self) -> int:
        """Rows of the batched leaves."""
        return next(t.shape[a] for t, a in zip(self.leaves, self.axes) if a is not None)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What calls that compute alike share: each leaf's axes, sample axis, type, or truth."""
        return tuple(
            (leaf.ndim, axis)
            if torch.is_tensor(leaf)
            else (leaf if isinstance(leaf, bool) else type(leaf))
            for leaf, axis in zip(self.leaves, self.axes)
        )

    def part(self, start: int, samples: int) -> UnitCall:
        """The call with the `samples` samples from `start` on only."""
        leaves = []
        for leaf, axis in zip(self.leaves, self.axes):
            if axis is not None:
                each = leaf.shape[axis] // self.samples
                leaf = leaf.narrow(axis, start * each, samples * each)
            leaves.append(leaf)
        return replace(self, leaves=leaves, samples=samples)

    def on_copies(self) -> UnitCall:
        """The call as a trial makes it: without growing a cache among the arguments."""
        return replace(self, run=lambda leaves: self.run([argument_copy(leaf) for leaf in leaves]))

    def inputs(self) -> list[torch.Tensor]:
        """The batched leaves, [samples, ..., rows per sample at the sample axis, ...]."""
        return [
            leaf.unflatten(axis, (self.samples, -1)).movedim(axis, 0)
            for leaf, axis in zip(self.leaves, self.axes)
            if axis is not None
        ]

    def with_inputs(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The leaves with `tensors` in the place of the batched ones."""
        values = iter(tensors)
        return [
            leaf if axis is None else next(values) for leaf, axis in zip(self.leaves, self.axes)
        ]


class UnitForward(CapturedForward):
    """Capture for a module without a rule, sample by sample, over its whole subtree."""

    def __init__(self, module: nn.Module, name: str, session: Session, axis: int):
        super().__init__(module, name, session)
        self.axis = axis
        #: False once vmap could not run the unit, or returned other gradients than autograd
        self._vectorised = True
        #: by a call's kind and the outputs' numbers of axes, the sample axis of each output
        self._output_axes: dict[tuple[Any, ...], list[int | None]] = {}
        #: (index, number of arguments) of arguments once seen with a first axis that was not the
        #: batch size: they are not batched. Remembered, because a [T, T] mask looks batched in a
        #: batch of T.
        self._shared: set[tuple[int, int]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        sink = session.open_sink
        if sink is None:
            return self.original(*args, **kwargs)
        slots = self.slots(self.module.modules())
        if not slots:
            return self.original(*args, **kwargs)
        call = self._take_apart(args, kwargs)
        self.show(sink, call)
        parameters = {id(p): self._per_sample(p, call.samples) for _, _, p in slots}
        outputs, others, spec = self._outputs(call, slots, parameters)
        vectorised = self._vectorised
        axes = self._axes_of(outputs, call, slots)
        if vectorised != self._vectorised:
            outputs, others, spec = self._outputs(call, slots, parameters)
        merged = (_merge(t, axis) for t, axis in zip(outputs, axes))
        return tree_unflatten([next(merged) if o is None else o[0] for o in others], spec)

    def show(self, sink: Sink, call: UnitCall) -> None:
        """Show the batched arguments of a call to the sink."""
        for leaf, axis in zip(call.leaves, call.axes):
            if axis is not None:
                sink.saw(self.name, "activations", leaf.movedim(axis, 0), call.samples)

    def _outputs(
        self, call: UnitCall, slots: list[Slot], parameters: dict[int, torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[tuple[Any] | None], Any]:
        """Tensors of all samples, [samples, ...]; other returned values; the nesting of both.

        Samples run under vmap. Where the unit raises anything under vmap, samples run in a loop,
        and an exception in the loop is the unit's own.
        """
        others: list[tuple[Any] | None] = []
        spec: Any = None

        def one_sample(
            parameters: dict[int, torch.Tensor], tensors: list[torch.Tensor]
        ) -> list[torch.Tensor]:
            nonlocal others, spec
            with swapped((m, n, parameters[id(p)]) for m, n, p in slots), self.session.paused():
                flat, spec = tree_flatten(call.run(call.with_inputs(tensors)))
            others = [None if isinstance(t, torch.Tensor) else (t,) for t in flat]
            return [t for t in flat if isinstance(t, torch.Tensor)]

        inputs = call.inputs()
        if call.samples > 1 and self._vectorised:
            vectorised = torch.func.vmap(one_sample, in_dims=(0, 0), randomness="different")
            try:
                with _PaddingKept():
                    return vectorised(parameters, inputs), others, spec
            except _StopRecomputationError:  # a checkpoint has recomputed all it needs
                raise
            except Exception:
                pass
        split = {key: value.unbind(0) for key, value in parameters.items()}
        rows = [
            one_sample({key: value[b] for key, value in split.items()}, [t[b] for t in inputs])
            for b in range(call.samples)
        ]
        self._vectorised = self._vectorised and call.samples == 1
        return [torch.stack(column) for column in zip(*rows)], others, spec

    def _take_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UnitCall:
        """The call's leaves and sample axes, as the module's class states them, or by size.

        Raises:
            NotPerSample: no argument has a sample axis, or rows cannot be assigned to samples.
        """
        if any(map(is_packed, (*args, *kwargs.values()))):
            raise NotPerSample(
                f"module {self.name!r} ({type(self.module).__name__}): a PackedSequence "
                "interleaves the steps of all samples; pass the padded tensor"
            )
        known = sample_axes(self.module, args, kwargs, self.axis)
        if known is None:
            leaves, spec = tree_flatten((args, kwargs))
            rows = self._rows(leaves)
            axes = [self._axis_of(leaf, rows, (i, len(leaves))) for i, leaf in enumerate(leaves)]

            def run(values: list[Any]) -> Any:
                arguments, keywords = tree_unflatten(values, spec)
                return self.original(*arguments, **keywords)

        else:
            named, axis_of = known
            leaves, spec = tree_flatten(named)
            names = [n for n, value in named.items() for _ in tree_leaves(value)]
            try:
                axes = [
                    axis_of(n, t) if torch.is_tensor(t) else None for n, t in zip(names, leaves)
                ]
            except ValueError as error:
                raise NotPerSample(
                    f"module {self.name!r} ({type(self.module).__name__}): {error}"
                ) from None
            rows = next(t.shape[a] for t, a in zip(leaves, axes) if a is not None)

            def run(values: list[Any]) -> Any:
                return self.original(**tree_unflatten(values, spec))

        ndim = next(t.ndim for t, a in zip(leaves, axes) if a is not None)
        return UnitCall(leaves, axes, run, self.session.samples_for(rows, self.name, ndim))

    def _axis_of(self, leaf: Any, rows: int, place: tuple[int, int]) -> int | None:
        """The sample axis of an argument; None for one that is the same for every sample."""
        if not torch.is_tensor(leaf) or leaf.ndim <= self.axis:
            return None
        length = leaf.shape[self.axis]
        if length not in (1, rows):
            self._shared.add(place)
        return self.axis if length == rows and place not in self._shared else None

    def _axes_of(
        self, outputs: list[torch.Tensor], call: UnitCall, slots: list[Slot]
    ) -> list[int | None]:
        """The sample axis of each output, found by the first call of a kind with two samples."""
        if call.samples == 1:
            return [None] * len(outputs)
        kind = (*call.kind, *(t.ndim for t in outputs))
        if kind not in self._output_axes:
            self._output_axes[kind] = self._verify(call, slots)
        return self._output_axes[kind]

    def _verify(self, call: UnitCall, slots: list[Slot]) -> list[int | None]:
        """The sample axis of each output.

        Outputs and the sum of the per-sample gradients are compared with an ordinary forward and
        backward pass. A unit whose gradient under vmap differs runs as a loop.

        Raises:
            NotPerSample: the batch's outputs or gradient are not the samples' put together.
        """
        axes, same_gradients = self._compare(call, slots)
        if not same_gradients and self._vectorised:
            self._vectorised = False
            axes, same_gradients = self._compare(call, slots)
        if _APART in axes or not same_gradients:
            raise NotPerSample(
                f"module {self.name!r} ({type(self.module).__name__}): its output or its gradient "
                "for the batch is not what its samples give one by one, so it couples samples or "
                "has them on another axis. Give it inputs with the sample axis first "
                "(batch_first=True), or freeze it"
            )
        return axes

    def _compare(self, call: UnitCall, slots: list[Slot]) -> tuple[list[int | None], bool]:
        """The sample axis of each output, and whether per-sample gradients sum to autograd's."""
        plain = {id(p): p.detach().clone().requires_grad_() for _, _, p in slots}
        own = {
            key: p.detach().expand(call.samples, *p.shape).clone().requires_grad_()
            for key, p in plain.items()
        }
        inputs = [t.detach() if isinstance(t, torch.Tensor) else t for t in call.leaves]
        call = replace(call, leaves=inputs).on_copies()
        with torch.enable_grad(), deterministic(self.module), self.session.paused():
            with swapped((m, n, plain[id(p)]) for m, n, p in slots):
                whole = [t for t in tree_leaves(call.run(call.leaves)) if torch.is_tensor(t)]
            apart, _, _ = self._outputs(call, slots, own)
            axes = [_axis_between(a, w, self.axis) for a, w in zip(apart, whole, strict=True)]
            if _APART in axes:
                return axes, True
            merged = [_merge(t, axis) for t, axis in zip(apart, axes)]
            expected = _gradients(whole, list(plain.values()))
            actual = _gradients(merged, list(own.values()))
        return axes, all(_same(a.sum(0), e) for a, e in zip(actual, expected))

    def _per_sample(self, parameter: nn.Parameter, samples: int) -> torch.Tensor:
        """[samples, *shape]: the parameter expanded, whose gradient goes to the sink."""

        def receive(grad_sample: torch.Tensor) -> None:
            sink = self.session.receiving_sink(samples)
            if sink is not None:
                sink.add(parameter, StoredOperand(grad_sample), samples, self.name)

        return OncePerSample.apply(self.session.anchor, parameter.detach(), receive, samples)

    def _rows(self, leaves: list[Any]) -> int:
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.ndim > self.axis:
                return leaf.shape[self.axis]
        raise NotPerSample(
            f"module {self.name!r} ({type(self.module).__name__}) owns parameters and takes no "
            "batched tensor, so its samples cannot be told apart; pass it the batch, or freeze it"
        )


class _PaddingKept(TorchFunctionMode):
    """Stops gradients at positions that hold ``padding_idx``, which vmap forgets."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        output = function(*args, **(kwargs or {}))
        if function not in (F.embedding, torch.embedding):
            return output
        bound = inspect.signature(F.embedding).bind(*args, **(kwargs or {})).arguments
        first, second = bound["input"], bound["weight"]
        indices, table = (second, first) if first.is_floating_point() else (first, second)
        padding_idx = bound.get("padding_idx")
        if padding_idx is None or (padding_idx < 0 and function is torch.embedding):
            return output
        held = (indices == padding_idx % table.shape[0]).unsqueeze(-1)
        return torch.where(held, output.detach(), output)


#: no axis puts the samples' outputs together to the batch's output
_APART = -1
#: the samples' outputs, stacked, are the batch's (a ``squeeze`` took the sample axis of each away)
_STACKED = -2


def _merge(output: torch.Tensor, axis: int | None) -> torch.Tensor:
    """[samples, ...] -> the batch's output, whose sample axis is `axis` (None: no sample axis)."""
    if axis == _STACKED:
        return output
    return output[0] if axis is None else output.movedim(0, axis).flatten(axis, axis + 1)


def _axis_between(apart: torch.Tensor, whole: torch.Tensor, first: int) -> int | None:
    """The axis on which `whole` holds the samples of `apart`; None if each sample is `whole`."""
    axes = sorted(range(apart.ndim - 1), key=lambda axis: axis != first)
    for axis in axes:
        if _same(_merge(apart, axis), whole):
            return axis
    if _same(apart, whole):
        return _STACKED
    constant = all(_same(one, whole) for one in apart)
    return None if constant and not whole.is_floating_point() else _APART


def _gradients(outputs: list[torch.Tensor], parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a fixed curved function of the outputs; zeros where autograd finds none."""
    curved = []
    for t in outputs:
        if t.requires_grad:
            weight = torch.linspace(0.5, 1.5, t.numel(), device=t.device, dtype=t.dtype)
            curved.append((weight.reshape(t.shape) * t + t.square() / 2).sum())
    if not curved:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(curved, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters)]


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
    if a.dtype == torch.float64:
        tolerance = 1e-9
    elif a.dtype == torch.float32 and not torch.is_autocast_enabled(a.device.type):
        tolerance = 1e-3
    else:
        tolerance = 3e-2
    scale = float(b.detach().double().abs().max()) if b.numel() else 0.0
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * scale)
