"""The wrappers DDP and FSDP2 around a model's forward, as capture needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from dpkernels.engine.capture.layer import CapturedForward, is_packed, leaves_of
from dpkernels.engine.capture.session import Session, Sink
from dpkernels.engine.capture.trial_book import TrialBook
from dpkernels.engine.processes.collectives import Processes
from dpkernels.engine.trial.mixing import refuse_mixing


class DirectForward(CapturedForward):
    """A DDP model's forward without DDP, which has nothing to reduce: autograd forms no gradient.

    At every forward DDP broadcasts buffers and marks unused parameters as reduced. Both would wait
    for a process that has fewer physical batches.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ddp: Any = self.module
        if ddp.device_ids:
            device = torch.device(ddp.device_type, ddp.device_ids[0])
            args, kwargs = tree_map(
                lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf,
                (args, kwargs),
                is_leaf=is_packed,
            )
        return ddp.module(*args, **kwargs)


def wrapper_forwards(module: nn.Module, session: Session) -> list[CapturedForward]:
    """Install a :class:`DirectForward` on a DDP model; other models have no wrapper's forward."""
    if not isinstance(module, DistributedDataParallel):
        return []
    forward = DirectForward(module, "", session)
    forward.install()
    return [forward]


def sharded_parameters(model: nn.Module) -> dict[tuple[int, str], nn.Parameter]:
    """By a module's id and a parameter's name, the shard of every parameter that FSDP2 gathers."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {
        (id(module), name): parameter
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and isinstance(parameter, DTensor)
    }


class Lockstep:
    """Keeps the processes of an FSDP2 model together: every pass gathers parameters from all.

    Before each training pass the processes tell each other whether the pass is the last of their
    logical batch. A process that has come to its last pass while others have not runs stand-in
    passes on a blank sample, so that the others can gather; the gradients of a stand-in pass are
    dropped. Trials for mixed samples run here too, in all processes at once and with equally many
    passes, where every process has two samples.

    Args:
        model: the FSDP2 root. Each training forward must be followed by one backward, always from
            the same outputs: a stand-in pass differentiates those (all outputs, before the first
            real backward).
        session: the model's session.
        processes: the processes.
        is_last: whether the pass to come is the last of this process's logical batch.
    """

    def __init__(
        self,
        model: nn.Module,
        session: Session,
        processes: Processes,
        is_last: Callable[[], bool],
    ):
        self.model, self.session, self.processes, self.is_last = model, session, processes, is_last
        self._inside = False
        self._trials = TrialBook(session.schedule)
        self._trials.trial = torch.compiler.disable(refuse_mixing)
        #: indices of the model's outputs from which the last backward pass came
        self._used: set[int] = set()
        self._handles = [
            model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        for module in model.modules():
            if isinstance(module, FSDPModule):
                self._handles.append(module.register_forward_pre_hook(self._guard))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _guard(self, module: nn.Module, args: Any) -> None:
        """Guard parameters as FSDP2 gathers them, whether or not their layers run."""
        if self.session.open_sink is not None:
            for below in module.modules():
                self.session.guards.wanted(below)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        sink = self.session.open_sink
        training = sink is not None and sink.trains and module.training
        if self._inside or in_backward or not training:
            return
        axis, views = self.session.axis, self.session.views
        leaves = leaves_of((args, kwargs))
        if any(is_packed(leaf) for leaf in leaves):
            raise ValueError(
                f"{type(module).__name__}: a PackedSequence cannot stand in for a process that has "
                "no more samples; with FSDP pass the padded tensor"
            )
        tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
        rows = next((t.shape[axis] for t in tensors if t.ndim > axis), 0)
        while True:
            last, samples = self.is_last(), rows // views
            due = self._trials.due(samples)
            others_go_on, too_few, any_due = self.processes.largest(
                [float(not last), samples < 2, due]
            )
            if any_due and not too_few:
                passes = (self.session, self._outputs, (args, kwargs), rows)
                self._alone(self._trials.run, samples, *passes, self._trials, self._any)
            if not (last and others_go_on):
                return
            empty = tree_map(lambda leaf: _without_rows(leaf, axis, rows), (args, kwargs))
            self._alone(self._stand_in, empty)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._inside or self.session.open_sink is None or not module.training:
            return
        used: set[int] = set()

        def note(place: int) -> None:
            self._used = used
            used.add(place)

        for place, leaf in enumerate(leaves_of(output)):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda _, place=place: note(place))

    def _alone(self, run: Callable[..., object], *args: Any) -> None:
        """Call `run`, whose passes do not train the model, and put the sink back."""
        sink, self._inside = self.session.sink, True
        try:
            run(*args)
        finally:
            self.session.sink, self._inside = sink, False

    def _any(self, here: bool) -> bool:
        """Whether any process says yes."""
        return bool(self.processes.largest([here])[0])

    def _stand_in(self, batch: tuple[Any, Any]) -> None:
        self.session.sink = Sink()
        args, kwargs = batch
        sums = [
            leaf.double().sum()
            for place, leaf in enumerate(leaves_of(self.model(*args, **kwargs)))
            if isinstance(leaf, torch.Tensor)
            and leaf.requires_grad
            and (place in self._used or not self._used)
        ]
        torch.stack(sums).sum().backward()

    def _outputs(self, batch: tuple[Any, Any]) -> list[torch.Tensor]:
        """The model's outputs, which the trial for mixed samples differentiates."""
        args, kwargs = batch
        return [t for t in leaves_of(self.model(*args, **kwargs)) if isinstance(t, torch.Tensor)]


def _without_rows(leaf: Any, axis: int, rows: int) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.ndim > axis and leaf.shape[axis] == rows:
        return leaf.narrow(axis, 0, 0)
    return leaf
