"""The model's own forward: where a batch enters, and where its backward pass begins."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from dpkernels.engine.capture import ModelCapture, NotPerSample, Untried
from dpkernels.engine.composite import CompositeForward
from dpkernels.engine.forward import CapturedForward, leaves_of


class RootForward(CapturedForward):
    """Finds the batch, arms capture, watches the outputs."""

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        capture = self.capture
        sink = capture.open_sink
        if sink is None:
            return self.original(*args, **kwargs)
        if not self.module.training:
            with capture.paused():
                return self.original(*args, **kwargs)
        if torch._C._current_graph_task_id() == -1:
            sink.reset()
        capture.refresh()
        capture.check_batch_norms()
        rows = self._rows(args, kwargs)
        args, kwargs = tree_map(_plain, (args, kwargs))
        capture.empty = rows == 0
        if capture.empty:
            rows = capture.views
            args, kwargs = tree_map(self._one_blank_sample, (args, kwargs))
        if rows % capture.views:
            raise ValueError(
                f"views_per_sample={capture.views}: the model's input has {rows} rows, "
                "expected a multiple of views_per_sample"
            )
        capture.samples = rows // capture.views
        try:
            if capture.tried is None and capture.samples > 1:
                self._try((args, kwargs), rows)
            capture.marked = False
            try:
                output = self.original(*args, **kwargs)
            except Untried:
                self._try((args, kwargs), rows)
                output = self.original(*args, **kwargs)
        finally:
            samples, capture.samples = capture.samples, None
        if capture.empty:
            output = tree_map(lambda t: self._no_rows(t, rows), output)
        for leaf in leaves_of(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(_Begin(capture, samples, capture.marked))
        return output

    def _try(self, batch: Any, rows: int) -> None:
        """Refuse a model in which the samples of this batch mix."""
        if self.capture.probe is not None:
            with self.capture.trial():
                self.capture.probe(self.capture, self._trial, batch, rows)

    def _trial(self, batch: tuple[tuple[Any, ...], dict[str, Any]]) -> list[torch.Tensor]:
        """The tensors that a forward pass over `batch` returns."""
        args, kwargs = batch
        leaves = leaves_of(self.original(*args, **kwargs))
        leaves = [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def _rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        axis = self.capture.axis
        if isinstance(self.inner, CompositeForward):
            return self.inner.rows(*args, **kwargs)
        for leaf in leaves_of((args, kwargs)):
            if isinstance(leaf, PackedSequence):
                return int(leaf.batch_sizes[0])
            if isinstance(leaf, torch.Tensor) and leaf.ndim > axis:
                return leaf.shape[axis]
        raise NotPerSample(
            f"{type(self.module).__name__}: none of the forward pass's arguments is a tensor with "
            f"a sample axis {axis}, so the batch size is unknown; pass the batch as a tensor"
        )

    def _one_blank_sample(self, leaf: Any) -> Any:
        axis = self.capture.axis
        if not isinstance(leaf, torch.Tensor) or leaf.ndim <= axis or leaf.shape[axis] != 0:
            return leaf
        shape = list(leaf.shape)
        shape[axis] = self.capture.views
        return leaf.new_zeros(shape)

    def _no_rows(self, leaf: Any, rows: int) -> Any:
        axis = self.capture.axis
        if isinstance(leaf, torch.Tensor) and leaf.ndim > axis and leaf.shape[axis] == rows:
            return leaf.narrow(axis, 0, 0).clone()
        return leaf


class _Begin:
    """Tensor hook on the model's outputs: tells the sink that a backward pass has reached it."""

    def __init__(self, capture: ModelCapture, samples: int, marked: bool):
        self.capture = capture
        self.samples = samples
        self.marked = marked

    def __call__(self, grad: torch.Tensor) -> None:
        sink, axis = self.capture.sink, self.capture.axis
        if sink is None or (self.marked and not self.capture.wants_this_backward()):
            return
        sink.begin(self.samples)
        rows = grad.movedim(axis, 0) if grad.ndim > axis else grad
        if rows.ndim and len(rows) and len(rows) % self.samples == 0:
            sink.saw("", "criterion", rows, self.samples)


def _plain(leaf: Any) -> Any:
    """MONAI's MetaTensor and other data-carrying subclasses as the tensors they hold."""
    if isinstance(leaf, torch.Tensor) and hasattr(leaf, "as_tensor"):
        return leaf.as_tensor()
    return leaf
