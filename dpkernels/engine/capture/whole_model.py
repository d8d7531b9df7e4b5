"""The model's own forward: where a batch enters, and where its backward pass begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import SequenceKey, keystr, tree_flatten_with_path, tree_map

from dpkernels.engine.capture.layer import CapturedForward, is_packed, leaves_of
from dpkernels.engine.capture.layer_in_parts import PartsForward
from dpkernels.engine.capture.refusals import NotPerSample, Untried
from dpkernels.engine.capture.session import CRITERION, Batch, Session
from dpkernels.engine.capture.streams import refuse_graph_capture
from dpkernels.engine.capture.trial_book import output_kind
from dpkernels.layers.sequence import arguments_of

#: a stranger among the arguments may have the batch's length by chance
_SQUARE = (
    "model: its argument {name} of shape {shape} is taken for one row of each sample, as it has as "
    "many rows as the batch; if it is the same for every sample, pass it with an axis in front "
    "(mask[None])"
)
_LIST = (
    "model: its first tensor stands in a list, and the tensor's own axis is taken for the samples; "
    "if every tensor of the list is one sample, pass torch.stack(list), one tensor [samples, ...], "
    "and call each layer once on the whole batch"
)


class WholeModelForward(CapturedForward):
    """The model's forward: finds the batch, opens it for the layers, hooks the outputs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        sink = session.open_sink
        if sink is None:
            return self.original(*args, **kwargs)
        if not self.module.training:
            with session.paused():
                return self.original(*args, **kwargs)
        if torch._C._current_graph_task_id() == -1:
            sink.reset()
        refuse_graph_capture(f"{type(self.module).__name__}.forward()")
        session.refresh()
        session.guards.check_batch_norms()
        rows = self._rows(args, kwargs)
        if any(_plain(leaf) is not leaf for leaf in leaves_of((args, kwargs))):
            args, kwargs = tree_map(_plain, (args, kwargs))  # new lists and dicts
        empty = rows == 0
        if empty:
            rows = session.views
            args, kwargs = tree_map(self._one_blank_sample, (args, kwargs))
        if rows % session.views:
            raise ValueError(
                f"views_per_sample={session.views}: the model's input has {rows} rows, "
                "expected a multiple of views_per_sample"
            )
        self._note_shared((args, kwargs), rows)
        batch = session.batch = Batch(rows, rows // session.views, empty)
        trial = (batch.samples, session, self._trial, (args, kwargs), rows)
        try:
            if session.trials.due(batch.samples):
                session.trials.run(*trial)
                batch.marked = False
            try:
                output = self.original(*args, **kwargs)
            except Untried:
                session.trials.run(*trial)
                output = self.original(*args, **kwargs)
        except NotPerSample as error:
            if _begins_with_list((args, kwargs), session.axis):
                raise NotPerSample(f"{_LIST} ({error})") from error
            square = self._square((args, kwargs), rows)
            if square:
                raise NotPerSample(f"{square} ({error})") from error
            raise
        finally:
            session.batch = None
        session.backward_batch = batch
        if empty:
            output = self._no_rows(output, rows)
        hook = _OutputHook(session, batch)
        for leaf in _returned(output):
            if leaf.requires_grad:
                leaf.register_hook(hook)
        return output

    def _trial(self, batch: tuple[tuple[Any, ...], dict[str, Any]]) -> list[torch.Tensor]:
        """The tensors that a forward pass over `batch` returns, behind the model's hooks."""
        args, kwargs = batch
        module, output = self.module, self.original(*args, **kwargs)
        for key, hook in list(module._forward_hooks.items()):
            named = (kwargs,) if key in module._forward_hooks_with_kwargs else ()
            changed = hook(module, args, *named, output)
            output = output if changed is None else changed
        return list(_returned(output))

    def _note_shared(self, batch: Any, rows: int) -> None:
        """Learn which arguments are the same for all: some batch has another length than they.

        Remembered, because a [T, T] mask looks batched in a batch of T.
        """
        axis = self.session.axis
        for path, leaf in tree_flatten_with_path(batch, is_leaf=is_packed)[0]:
            tensor = isinstance(leaf, torch.Tensor) and leaf.ndim > axis
            if tensor and leaf.shape[axis] not in (1, rows):
                self.session.trials.shared.add(keystr(path))

    def _square(self, batch: Any, rows: int) -> str | None:
        """What to say of a [rows, rows] tensor among the arguments, besides the first."""
        leaves = tree_flatten_with_path(batch, is_leaf=is_packed)[0]
        for path, leaf in leaves[1:]:
            square = isinstance(leaf, torch.Tensor) and leaf.shape[:2] == (rows, rows)
            if square and keystr(path) not in self.session.trials.shared:
                name = ("kwargs" if path[0] == SequenceKey(1) else "args") + keystr(path[1:])
                return _SQUARE.format(name=name, shape=list(leaf.shape))
        return None

    def _rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        axis = self.session.axis
        if isinstance(self.inner, PartsForward):
            return self.inner.rows(arguments_of(self.module, args, kwargs))
        for leaf in leaves_of((args, kwargs)):
            if isinstance(leaf, PackedSequence):
                return int(leaf.batch_sizes[0])
            if isinstance(leaf, torch.Tensor) and leaf.ndim > axis:
                return leaf.shape[axis]
        raise NotPerSample(
            f"{type(self.module).__name__}: none of the forward pass's arguments is a tensor with "
            f"a sample axis {axis}, so the batch size is unknown; pass the batch as a tensor "
            "(model(**batch) where it is a mapping)"
        )

    def _one_blank_sample(self, leaf: Any) -> Any:
        axis = self.session.axis
        if not isinstance(leaf, torch.Tensor) or leaf.ndim <= axis or leaf.shape[axis] != 0:
            return leaf
        shape = list(leaf.shape)
        shape[axis] = self.session.views
        return leaf.new_zeros(shape)

    def _no_rows(self, output: Any, rows: int) -> Any:
        axis = self.session.axis

        def one(leaf: Any) -> Any:
            if _is_record(leaf):
                return replace(leaf, **{n: self._no_rows(v, rows) for n, v in _fields(leaf)})
            if isinstance(leaf, torch.Tensor) and leaf.ndim > axis and leaf.shape[axis] == rows:
                return leaf.narrow(axis, 0, 0).clone()
            return leaf

        return tree_map(one, output)


def _begins_with_list(batch: tuple[tuple[Any, ...], dict[str, Any]], axis: int) -> bool:
    """Whether the tensor that states the batch size stands in a list among the arguments."""
    leaves, _ = tree_flatten_with_path(batch, is_leaf=is_packed)
    for (_, _, *inside), leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.ndim > axis:
            return bool(inside) and isinstance(inside[0], SequenceKey)
    return False


def _is_record(leaf: Any) -> bool:
    """Whether a leaf is a dataclass, whose fields PyTorch's pytrees do not show."""
    return is_dataclass(leaf) and not isinstance(leaf, type)


def _fields(record: Any) -> list[tuple[str, Any]]:
    return [(f.name, getattr(record, f.name)) for f in fields(record) if f.init]


def _returned(output: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    """The tensors in an output, also inside objects and containers that PyTorch's pytrees lack."""
    for leaf in leaves_of(output):
        if isinstance(leaf, PackedSequence):
            yield leaf.data
        elif isinstance(leaf, torch.Tensor):
            yield leaf
        elif depth:
            yield from _returned(_inside(leaf), depth - 1)


def _inside(leaf: Any) -> list[Any]:
    """What an object or container holds that is no pytree."""
    if isinstance(leaf, (str, bytes, type, nn.Module)):
        return []
    if isinstance(leaf, Mapping):
        return list(leaf.values())
    if isinstance(leaf, (list, tuple, set, frozenset)):
        return list(leaf)
    return list(getattr(leaf, "__dict__", {}).values())


class _OutputHook:
    """Tensor hook on the outputs of one forward pass, called once a backward pass reaches them."""

    def __init__(self, session: Session, batch: Batch):
        self.session = session
        self.batch = batch
        #: id of the backward pass that has reached the outputs
        self._pass: int | None = None

    def __call__(self, grad: torch.Tensor) -> None:
        session, batch = self.session, self.batch
        sink, axis = session.sink, session.axis
        if sink is None or (batch.marked and not session.wants_this_backward()):
            return
        if batch.folded is not None:
            raise NotPerSample(
                f"layer {batch.folded!r}: it has several rows for each sample, and no trial "
                "can tell which rows are whose, as the samples of the model's first tensor are all "
                "alike, or not finite; pass the batch as the first tensor, and train on finite "
                "samples that differ"
            )
        under_way = torch._C._current_graph_task_id()
        if sink.trains:
            session.trials.differentiates(output_kind(grad, axis))
        if self._pass not in (None, under_way) and sink.trains:
            raise NotPerSample(
                "backward(): a second backward pass through the same forward pass would clip and "
                "add every sample twice; call backward() once, on the sum of the losses"
            )
        self._pass = under_way
        session.backward_batch = batch
        sink.begin(batch.samples)
        rows = grad.movedim(axis, 0) if grad.ndim > axis else grad
        if rows.ndim and len(rows) and len(rows) % batch.samples == 0:
            sink.saw("", CRITERION, rows, batch.samples)


def _plain(leaf: Any) -> Any:
    """The plain tensor of a MONAI MetaTensor or of a like subclass; any other leaf as it is."""
    if isinstance(leaf, torch.Tensor) and hasattr(leaf, "as_tensor"):
        return leaf.as_tensor()
    return leaf
