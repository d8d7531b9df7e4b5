"""Do samples mix? One sample of a batch is replaced; no value of another sample may move.

A trial before training starts finds faults that no list of layer types can: a transposed batch
axis, positions embedded once for the whole batch, statistics over the batch, a loss that
normalises by the whole batch. All passes of a trial draw the same random numbers, of torch, numpy
and Python, so dropout and randomly skipped layers do not matter.

A trial makes forward and backward passes over the whole batch, without weight gradients. A few
samples of the batch would not do: statistics over groups of ``batch / groups`` samples mix nobody
in a batch of ``groups``, and everybody in a larger one.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from dpkernels.engine.capture.layer import is_packed, leaves_of
from dpkernels.engine.capture.refusals import NotPerSample
from dpkernels.engine.capture.session import Session
from dpkernels.engine.capture.trial_book import TrialBook
from dpkernels.engine.trial.fingerprints import Fingerprints, Seen

#: relative change of another sample's values that counts as rounding, by significand
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE_TOLERANCE = 3e-2
#: the same, once a repeated pass has given the same bits
_FINE_TOLERANCE = 1e-3
#: the smallest float32 with all digits
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class BatchRows:
    """Where a batch has its samples: `rows` rows on `axis`, each sample `views` adjacent ones.

    A tensor of the batch is batched if and only if it has `rows` rows on `axis`.
    """

    rows: int
    views: int
    axis: int

    @property
    def samples(self) -> int:
        return self.rows // self.views

    def holds(self, leaf: Any) -> bool:
        """Whether a leaf of the batch is a batched tensor."""
        tensor = isinstance(leaf, torch.Tensor) and leaf.ndim > self.axis
        return tensor and leaf.shape[self.axis] == self.rows

    def by_sample(self, leaf: torch.Tensor) -> torch.Tensor:
        """[samples, n]: the values of a batched tensor."""
        return leaf.detach().movedim(self.axis, 0).reshape(self.samples, -1)


def refuse_mixing(
    session: Session,
    run: Callable[[Any], list[torch.Tensor]],
    batch: Any,
    rows: int,
    source: int = -1,
) -> bool:
    """Replace the first, then the last sample of a batch; refuse a model if another one's move.

    One of the two would not do: a row that takes everybody's gradient (``positions(ids)[0]``) hides
    behind the sample that owns the row.

    Args:
        session: the model's session.
        run: forward pass on a batch; returns the tensors to differentiate (batched or scalar).
        batch: nested arguments of `run`.
        rows: rows of the batch.
        source: the sample that takes the place of the replaced one, where the two differ.

    Returns:
        Whether the batch could tell: not where a sample that is not finite spread to another.

    Raises:
        NotPerSample: samples mix; the message names the layer.
    """
    at = BatchRows(rows, session.views, session.axis)
    if not can_tell(batch, at):
        return False
    samples = at.samples
    source %= samples
    batch = tree_map(_apart, batch, is_leaf=is_packed)
    replaced = [(0, source), (samples - 1, source if source < samples - 1 else 0)]
    with _own_random_numbers(session.root):
        seed = int(torch.randint(2**31, ()))
        first = _watched(session, run, batch, seed)
        for target, preferred in replaced:
            others = _unlike(batch, at, target)
            other = preferred if preferred in others else others[-1]
            try:
                second = _watched(session, run, _twin(batch, at, target, other), seed)
            except NotPerSample:
                raise
            except Exception:  # the model may want lengths sorted
                kept = _twin(batch, at, target, other, keep_lengths=True)
                second = _watched(session, run, kept, seed)
            fault = _compare(first, second, target)
            faint = _compare(first, second, target, _FINE_TOLERANCE)
            shapes = [[seen.shape for seen in found.seen] for found in (first, second)]
            if fault is None and faint is not None and shapes[0] == shapes[1]:
                again = _watched(session, run, batch, seed)
                fault = faint if _compare(first, again, None, 0.0) is None else None
            if fault is not None:
                raise NotPerSample(fault)
    broken = _not_finite(batch, at)
    if not bool(broken.any()):
        return True
    return int((~broken).sum()) > 1 and bool((first.finite() | broken).all())


def _not_finite(batch: Any, at: BatchRows) -> torch.Tensor:
    """[samples]: whether a sample of the batch has a value that is not finite."""
    broken = torch.zeros(at.samples, dtype=torch.bool)
    for leaf in leaves_of(batch):
        if is_packed(leaf):
            broken |= not bool(leaf.data.isfinite().all())
        elif at.holds(leaf):
            broken |= ~at.by_sample(leaf).isfinite().all(1).cpu()
    return broken


def can_tell(batch: Any, at: BatchRows) -> bool:
    """Whether replacing the first or the last sample of a batch can show that samples mix.

    A batch of one sample cannot tell, nor one whose samples are all alike, such as the zeros of a
    forward pass by hand.
    """
    return at.samples > 1 and all(_unlike(batch, at, target) for target in (0, at.samples - 1))


def _unlike(batch: Any, at: BatchRows, target: int) -> list[int]:
    """Samples that differ from sample `target`."""
    unlike = torch.zeros(at.samples, dtype=torch.bool)
    for leaf in leaves_of(batch):
        if is_packed(leaf):
            unlike[:] = True
        elif at.holds(leaf):
            values = at.by_sample(leaf)
            unlike |= (values != values[target]).any(1).cpu()
    unlike[target] = False
    return unlike.nonzero().flatten().tolist()


@contextlib.contextmanager
def _own_random_numbers(model: nn.Module) -> Iterator[None]:
    """Restore the state of torch's, numpy's and Python's generators afterwards."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002 - models use it
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002


def _watched(
    session: Session, run: Callable[[Any], list[torch.Tensor]], batch: Any, seed: int
) -> Fingerprints:
    """Fingerprints of one forward and backward pass."""
    sink = session.sink
    session.sink = found = Fingerprints()
    try:
        with _kept_buffers(session.root):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            outputs = [t for t in run(batch) if t.requires_grad]
            torch.manual_seed(seed + 1)
            slopes = [_slopes(t) if t.ndim > session.axis else torch.ones_like(t) for t in outputs]
            if outputs:
                torch.autograd.backward(outputs, slopes)
            if session.anchor.is_cuda:  # a model may work on streams of its own
                torch.cuda.synchronize(session.anchor.device)
            buffers = session.root.named_buffers()
            found.buffers = {name: buffer.detach().clone() for name, buffer in buffers}
    finally:
        session.sink = sink
    return found


def _slopes(output: torch.Tensor) -> torch.Tensor:
    """The gradient of a stand-in loss, which is a sum over samples, with another slope everywhere.

    A constant slope would not do: behind a normalisation, a constant slope's gradient is zero.
    """
    return torch.rand_like(output).add_(output.detach().nan_to_num(0.0, 0.0, 0.0))


def _compare(
    first: Fingerprints, second: Fingerprints, replaced: int | None, most: float = _COARSE_TOLERANCE
) -> str | None:
    """A sentence on the first tensor that moved between two passes; None if none did.

    Args:
        first: fingerprints of one pass.
        second: fingerprints of the other pass.
        replaced: the sample that was replaced, which may move; None: no sample may.
        most: largest relative change that counts as rounding.
    """
    if [(s.layer, s.kind) for s in first.seen] != [(s.layer, s.kind) for s in second.seen]:
        return "the model takes another path through its layers when one sample is replaced"
    for a, b in zip(first.seen, second.seen):
        before, after = first.fingerprint(a), second.fingerprint(b)
        moved = (before - after).abs()
        moved[~before.isfinite() & ~after.isfinite()] = 0.0
        if replaced is not None:
            moved[replaced] = 0.0
        before = before.where(before.isfinite(), 0.0)
        sum_scale, norm_sq_scale = before.abs().amax(0)
        # a sum may cancel (behind a LayerNorm it is 0 but for rounding): its terms do not
        sum_scale = torch.maximum(sum_scale, norm_sq_scale.sqrt())
        scale = torch.stack([sum_scale + _TINY, norm_sq_scale + _TINY**2])
        samples = (~(moved <= min(_tolerance(a.dtype), most) * scale)).any(1).nonzero()
        if len(samples):
            return _sentence(a, int(samples[0]), replaced)
    for name, buffer in first.buffers.items():
        if _moved(buffer, second.buffers.get(name)):
            return (
                f"buffer {name!r}: what the forward pass leaves in it moves when sample {replaced} "
                "is replaced, so it keeps private data that nothing clips or adds noise to. Do not "
                "update it in training (put its module in eval mode)"
            )
    return None


def _tolerance(dtype: torch.dtype) -> float:
    """Relative change of another sample's values that counts as rounding."""
    if not dtype.is_floating_point:
        return _TOLERANCE[torch.float64]
    return _TOLERANCE.get(dtype, _COARSE_TOLERANCE)


def _moved(buffer: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether two passes left different values in a buffer, beyond rounding."""
    if other is None or buffer.shape != other.shape:
        return True
    if not buffer.is_floating_point():
        return not torch.equal(buffer, other)
    tolerance = _tolerance(buffer.dtype)
    return not torch.allclose(
        buffer.double(), other.double(), rtol=tolerance, atol=0.0, equal_nan=True
    )


def _sentence(seen: Seen, sample: int, replaced: int | None) -> str:
    if seen.kind == "criterion":
        return (
            f"the gradient of the criterion for sample {sample} moves when sample {replaced} is "
            "replaced: the criterion couples samples (batch-wide Dice, weighted or ignore_index "
            "mean, a contrastive loss). Use a loss that is a mean of per-sample losses"
        )
    return (
        f"layer {seen.layer!r}: the {seen.kind} of sample {sample} move when sample {replaced} is "
        "replaced, so rows of its first axis are not the samples, or a layer beside it couples "
        "samples, or a loss in the model does. Give the layer inputs with the sample axis first "
        "(batch_first=True in attention and recurrent layers, positions as [batch, length]), "
        "GroupNorm for batch statistics"
    )


def _twin(
    batch: Any, at: BatchRows, target: int, source: int, *, keep_lengths: bool = False
) -> Any:
    """The batch with sample `target` replaced by sample `source`.

    With `keep_lengths`, a vector of one integer per sample stays: a model may want lengths sorted.
    """

    def one(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            return _replace_packed(leaf, target, source)
        lengths = keep_lengths and isinstance(leaf, torch.Tensor) and leaf.ndim == 1
        if not at.holds(leaf) or (lengths and not leaf.is_floating_point()):
            return leaf
        twin = leaf.detach().clone()
        rows_of_source = leaf.detach().narrow(at.axis, source * at.views, at.views)
        twin.narrow(at.axis, target * at.views, at.views).copy_(rows_of_source)
        return twin.requires_grad_(leaf.requires_grad)

    return tree_map(one, batch, is_leaf=is_packed)


def _apart(leaf: Any) -> Any:
    """The leaf detached, so that a trial's gradients do not reach the graph behind the leaf."""
    if isinstance(leaf, PackedSequence):
        return PackedSequence(_apart(leaf.data), *leaf[1:])
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().requires_grad_(leaf.requires_grad)


def _replace_packed(packed: PackedSequence, target: int, source: int) -> PackedSequence:
    """The sequence with the steps of sample `target` replaced by those of sample `source`.

    All lengths stay: the steps of a shorter `source` are repeated.
    """
    places = packed.unsorted_indices
    to, of = (target, source) if places is None else (int(places[target]), int(places[source]))
    steps = packed.data.detach().clone().split(packed.batch_sizes.tolist())
    others = [step[of].clone() for step in steps if len(step) > of]
    for t, step in enumerate(steps):
        if len(step) > to:
            step[to] = others[t % len(others)]
    data = torch.cat(steps).requires_grad_(packed.data.requires_grad)
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, places)


@contextlib.contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Restore all buffers' values afterwards."""
    kept = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                if buffer is not None and value is not None:
                    buffer.copy_(value)
                module._buffers[name] = buffer


def check_criterion(
    model: nn.Module,
    session: Session,
    criterion: Callable[..., torch.Tensor],
    batch: Sequence[Any],
) -> None:
    """Raise :class:`NotPerSample` where model or criterion let samples influence each other.

    Args:
        model: the captured model, in training mode.
        session: the model's session.
        criterion: called as ``criterion(model(*inputs), target)``.
        batch: inputs, then the target; at least two samples.
    """
    rows = batch[0].shape[session.axis]
    at = BatchRows(rows, session.views, session.axis)
    if not can_tell(list(batch), at):
        raise ValueError(f"batch: it holds {rows} rows, expected two samples or more that differ")

    def run(batch: Sequence[Any]) -> list[torch.Tensor]:
        *inputs, target = batch
        return [criterion(model(*inputs), target)]

    trials, session.trials = session.trials, TrialBook()
    try:
        for source in sorted({1, at.samples // 2, at.samples - 1}):
            refuse_mixing(session, run, list(batch), rows, source)
    finally:
        session.trials = trials
