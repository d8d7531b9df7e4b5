"""The generic fallback: a module that owns parameters no rule knows, with everything below it.

The unit's forward runs once per sample under ``torch.func.vmap`` with each trained parameter
expanded along the samples; ordinary autograd then returns per-sample gradients. What vmap cannot
trace (data-dependent control flow, recurrent kernels) runs as a loop over samples, which is the
definition itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from dpkernels.engine.capture import CapturedForward, ModelCapture, NotPerSample, swapped
from dpkernels.layers.operands import StoredOperand


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


class UnitForward(CapturedForward):
    """Capture for a module without a rule, sample by sample, over its whole subtree."""

    def __init__(self, module: nn.Module, name: str, capture: ModelCapture):
        super().__init__(module, name, capture)
        self.loop_reason: str | None = None
        self._unverified = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        capture = self.capture
        slots = self._slots() if capture.recording else []
        if not slots:
            return self.original(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        rows = self._rows(leaves)
        samples = capture.samples_for(rows, self.name)
        batched = [
            isinstance(t, torch.Tensor) and t.ndim > capture.axis and t.shape[capture.axis] == rows
            for t in leaves
        ]
        for tensor in (t for t, b in zip(leaves, batched) if b):
            rows_first = tensor.movedim(capture.axis, 0)
            capture.sink.saw(self.name, "activations", rows_first, samples)
        grouped = [self._group(t, samples) if b else t for t, b in zip(leaves, batched)]
        parameters = {id(p): self._per_sample(p, samples) for _, _, p in slots}

        def one_sample(
            parameters: dict[int, torch.Tensor], tensors: list[torch.Tensor]
        ) -> list[torch.Tensor]:
            values = iter(tensors)
            merged = [next(values) if b else t for t, b in zip(leaves, batched)]
            arguments, keywords = tree_unflatten(merged, spec)
            with swapped((m, n, parameters[id(p)]) for m, n, p in slots), capture.paused():
                output = self.original(*arguments, **keywords)
            nonlocal others, output_spec
            flat, output_spec = tree_flatten(output)
            others = [None if isinstance(t, torch.Tensor) else (t,) for t in flat]
            return [t for t in flat if isinstance(t, torch.Tensor)]

        others: list[tuple[Any] | None] = []
        output_spec: Any = None
        inputs = [t for t, b in zip(grouped, batched) if b]
        if self._unverified:
            self._verify(one_sample, inputs, samples, args, kwargs)
        outputs = iter(self._run(one_sample, parameters, inputs, samples))
        merged = [self._ungroup(next(outputs)) if o is None else o[0] for o in others]
        return tree_unflatten(merged, output_spec)

    def _verify(
        self,
        one_sample: Callable[..., list[torch.Tensor]],
        inputs: list[torch.Tensor],
        samples: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Refuse a unit whose result for the batch is not its results sample by sample."""
        self._unverified = False
        slots = self._slots()
        with torch.no_grad(), _deterministic(self.module), self.capture.paused():
            whole = tree_leaves(self.original(*args, **kwargs))
            plain = {id(p): p.expand(samples, *p.shape) for _, _, p in slots}
            apart = [self._ungroup(t) for t in self._run(one_sample, plain, inputs, samples)]
        whole = [t for t in whole if isinstance(t, torch.Tensor)]
        if all(a.shape == b.shape and _close(a, b) for a, b in zip(whole, apart, strict=True)):
            return
        raise NotPerSample(
            f"module {self.name!r} ({type(self.module).__name__}): its output for the batch is not "
            "what it returns sample by sample, so it couples samples or has them on another axis. "
            "Give it inputs with the sample axis first (batch_first=True), or freeze it"
        )

    def _per_sample(self, parameter: nn.Parameter, samples: int) -> torch.Tensor:
        """[samples, *shape]: the parameter expanded; its gradient goes to the sink."""

        def receive(grad_sample: torch.Tensor) -> None:
            sink = self.capture.sink
            if sink is not None:
                sink.begin(samples)
                sink.add(parameter, StoredOperand(grad_sample), samples, self.name)

        return _PerSample.apply(self.capture.anchor, parameter.detach(), receive, samples)

    def _slots(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Every place below the unit where a trained parameter sits."""
        return [
            (module, name, module._parameters[name])
            for module in self.module.modules()
            for name in sorted(self.capture.wanted(module))
        ]

    def _rows(self, leaves: list[Any]) -> int:
        axis = self.capture.axis
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.ndim > axis:
                return leaf.shape[axis]
        raise NotPerSample(
            f"module {self.name!r} ({type(self.module).__name__}) owns parameters and takes no "
            "batched tensor, so its samples cannot be told apart; pass it the batch, or freeze it"
        )

    def _group(self, tensor: torch.Tensor, samples: int) -> torch.Tensor:
        """Split the sample axis: [samples, ..., rows per sample at the old place, ...]."""
        axis = self.capture.axis
        split = tensor.unflatten(axis, (samples, -1))
        return split.movedim(axis, 0)

    def _ungroup(self, output: torch.Tensor) -> torch.Tensor:
        axis = self.capture.axis
        if output.ndim <= axis + 1:
            return output
        return output.movedim(0, axis).flatten(axis, axis + 1)

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


@contextlib.contextmanager
def _deterministic(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: no dropout, no statistics."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in modes:
            m.training = False
        yield
    finally:
        for m, training in modes:
            m.training = training


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    tolerance = 1e-9 if a.dtype == torch.float64 else 1e-3 if a.dtype == torch.float32 else 3e-2
    scale = float(a.double().abs().max()) if a.numel() else 0.0
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * scale)
