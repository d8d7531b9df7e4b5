"""What two passes of a trial differ in, of which kind the fault is, and what helps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, zip_longest
from typing import Any

import numpy as np
import torch

from dpkernels.engine.capture.session import CRITERION
from dpkernels.engine.capture.trial_book import SCALAR
from dpkernels.engine.trial.fingerprints import Fingerprints, Seen
from dpkernels.engine.trial.poisons import Poison

#: relative change of another sample's values that counts as rounding, by significand
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE_TOLERANCE = 3e-2
#: the smallest float32 with all digits
_TINY = torch.finfo(torch.float32).tiny
#: a change that is rounding by its size is none if it grows by this factor with the poison,
_GROWTH = 10.0
#: and is then as large as this many units in the last place
_ULPS = 8.0


class Kind(Enum):
    """The kinds of mixing, each with what it is and a remedy."""

    STATISTICS = (
        "Statistics over the batch, or another sample's values, enter the layer's input: a mean, "
        "maximum, quantile or sort over the sample axis, a condition on one, a roll, a padding "
        "that follows the longest sample. Take statistics of each sample by itself (GroupNorm, "
        "LayerNorm, x / x.abs().amax(dim=tuple(range(1, x.ndim)), keepdim=True)), or constants "
        "chosen before training"
    )
    ROWS = (
        "Rows of the layer's first axis are not the samples: its input is the same whatever the "
        "samples are (positions, prototypes, a table for everybody), or has the sample axis "
        "elsewhere. Give the layer inputs with the sample axis first (batch_first=True in "
        "attention and recurrent layers, positions and tables expanded to [batch, ...])"
    )
    LOSS = (
        "The model's own loss couples samples: a mean over the tokens or voxels that count in the "
        "whole batch, class weights, a contrastive term. Let the model return its outputs, and "
        "take a loss of each sample, its own mean over what counts in it, and then the mean over "
        "samples: loss = F.cross_entropy(logits.movedim(-1, 1), labels, reduction='none'); "
        "(loss.flatten(1).sum(1) / (labels != -100).flatten(1).sum(1).clamp(min=1)).mean()"
    )
    BACKWARD = (
        "The backward pass couples samples, the forward pass does not: a hook that bounds or "
        "centres the batch's gradient, or an autograd.Function that normalises over rows. Bound "
        "each sample's gradient by itself (torch.linalg.vector_norm(g, "
        "dim=tuple(range(1, g.ndim)), keepdim=True)), or drop the hook: clipping bounds what every "
        "sample can do"
    )
    OUTPUT = (
        "The model returns a tensor that has no row for each sample, and in which samples meet (a "
        "mean or a product over the batch, a softmax over all samples' tokens), or its backward "
        "pass couples samples by a hook. Return outputs [batch, ...], each row of one sample, and "
        "take means over samples in the loss; .detach() what is only looked at"
    )
    BRANCH = (
        "The model branches on its batch: a condition on all samples decides for each. Decide for "
        "every sample by itself (torch.where), or by a constant chosen before training"
    )
    STATE = (
        "State is carried from one step to the next, so a record moves what later steps release "
        "and nothing accounts for it. Start every forward pass afresh (reset the state at its "
        "beginning), or keep what does not depend on the data"
    )
    BUFFER = (
        "Do not update it in training (put its module in eval mode after every model.train()), or "
        "keep statistics of what is public"
    )
    CRITERION = (
        "The criterion couples samples (batch-wide Dice, weighted or ignore_index mean, a "
        "contrastive loss). Use a loss that is a mean of per-sample losses"
    )
    UNREPEATABLE = (
        "Samples cannot be told apart from chance: draw random numbers from torch's, numpy's or "
        "Python's global generators or from a torch.Generator in an attribute of a module, keep "
        "state in attributes of modules, or try nothing with make_private(trial='off')"
    )

    @classmethod
    def of(cls, seen: Seen, same_input: bool) -> Kind:
        """The kind of a fault that shows first in a tensor.

        Args:
            seen: the tensor.
            same_input: whether the layer's input is the same whatever the samples are.
        """
        if seen.kind == CRITERION:
            return cls.CRITERION
        if same_input:
            return cls.ROWS
        if not seen.backward:
            return cls.STATISTICS
        return cls.LOSS if seen.backward == SCALAR else cls.BACKWARD


@dataclass(frozen=True)
class Finding:
    """Samples mix.

    Attributes:
        where: the layer, output or attribute.
        what: what moves, of which sample, and when.
        kind: the kind of fault.
        of_shapes: whether a shape or the path through the layers moved, as with lengths.
    """

    where: str
    what: str
    kind: Kind
    of_shapes: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.kind.value}"

    @classmethod
    def of_published(cls, where: str, poison: Poison) -> Finding:
        """What the forward pass leaves in a buffer or parameter depends on samples."""
        what = (
            f"what the forward pass leaves in it moves when {poison} replaced, so it keeps private "
            "data that nothing clips or adds noise to"
        )
        return cls(where, what, Kind.BUFFER)


class Comparison:
    """Two passes over a batch, compared tensor by tensor and sample by sample.

    Args:
        first: one pass.
        second: another, with other values in samples that are not watched.
        watched: bool [samples]: those that may not move.

    Attributes:
        seen: the tensors of the first pass.
        parting: the layer from which the passes took different paths; None where they did not, and
            only then are there the other attributes.
        same_shapes: whether every tensor had the same shape in both.
        moved: bool [seen, samples]: whether a watched sample is finite in one pass only, or has
            changed by more than rounding.
        moves: float64 [seen, samples]: relative change of watched samples that are finite.
        bits_moved: bool [seen, samples]: of watched samples, where shapes are the same.
    """

    def __init__(self, first: Fingerprints, second: Fingerprints, watched: torch.Tensor):
        self.seen = first.seen
        self._first, self._second, self._watched = first, second, watched
        names = [[(s.layer, s.kind, s.backward) for s in found.seen] for found in (first, second)]
        pairs = zip_longest(*names, fillvalue=("", "", ""))
        self.parting = next(((a[0] or b[0]) for a, b in pairs if a != b), None)
        if self.parting is None:
            self._compare()

    def _compare(self) -> None:
        first, second, watched = self._first, self._second, self._watched
        shapes = [a.shape == b.shape for a, b in zip(first.seen, second.seen)]
        self.same_shapes = all(shapes)
        same = torch.tensor(shapes, dtype=torch.bool).reshape(-1, 1)
        before, after = first.moments, second.moments
        finite, still = before.isfinite().all(2), after.isfinite().all(2)
        changes = (before - after).abs().where((finite & still)[..., None], 0.0)
        changes[..., 2].masked_fill_(~same, 0.0)  # signs go by position
        before = before.where(before.isfinite(), 0.0)
        squares = before[..., 1].amax(1)
        norms = squares.sqrt() + _TINY
        # a sum may cancel (behind a LayerNorm it is 0 but for rounding): its terms do not
        sums = torch.maximum(before[..., 0].abs().amax(1), norms)
        scales = torch.stack([sums, squares + _TINY**2, norms], 1)
        self.moves = (changes / scales[:, None]).amax(2) * watched
        # behind half precision (autocast), single precision is rounded alike
        most = accumulate((tolerance(seen.dtype) for seen in first.seen), max)
        rounding = torch.tensor(list(most), dtype=torch.float64).reshape(-1, 1)
        self.moved = ((finite != still) & watched) | (self.moves > rounding)
        self.bits_moved = (first.bits != second.bits).any(2) & watched & same

    def differs(self) -> bool:
        """Whether the passes went apart, or a watched sample moved."""
        return self.parting is not None or bool(self.moved.any())

    def said_of(self, place: int, poison: Poison) -> str:
        """A clause on the first sample that moved in a tensor."""
        sample = int(self.moved[place].nonzero()[0])
        return f"the {self.seen[place].kind} of sample {sample} move when {poison} replaced"

    def first_moved(self) -> int | None:
        """The place of the first tensor that moved; None where passes went apart, too."""
        if self.parting is not None:
            return None
        places = self.moved.any(1).nonzero().flatten()
        return int(places[0]) if len(places) else None

    def output_beside_lengths(self) -> int | None:
        """The first output that moved though its own shape did not, where another shape did.

        What is padded to the longest sample has other shapes, and may be masked later: then outputs
        with a row for each sample stay, but for what kernels of other shapes round. Outputs of
        passes that drew other random numbers, such as a dropout's of other shapes, tell nothing.
        """
        alike = self.parting is not None or self.same_shapes
        if alike or self._first.drawn != self._second.drawn:
            return None
        for place, (a, b) in enumerate(zip(self._first.seen, self._second.seen)):
            is_output = a.kind.startswith("values of output") and a.shape == b.shape
            if is_output and bool(self.moved[place].any()):
                return place
        return None

    def same_input(self, layer: str) -> bool:
        """Whether the activations of a layer did not change for anybody, poisoned or not."""
        places = [
            place
            for place, seen in enumerate(self.seen)
            if (seen.layer, seen.kind) == (layer, "activations")
        ]
        same = torch.equal(self._first.bits[places], self._second.bits[places])
        return bool(places) and same

    def axes(self) -> dict[tuple[str, str], int | None]:
        """By layer and kind of tensor: 0 where NaN stands in poisoned samples, None if nowhere."""
        spoiled = (self._first.moments.isfinite() & ~self._second.moments.isfinite()).any(2)
        return {
            (seen.layer, seen.kind): 0 if bool((spoiled[place] & ~self._watched).any()) else None
            for place, seen in enumerate(self.seen)
            if not bool((spoiled[place] & self._watched).any())
        }

    def grown_from(self, smaller: Comparison) -> int | None:
        """The first tensor whose change is many times that under a smaller poison, in sum."""
        before, after = smaller.moves.sum(1), self.moves.sum(1)
        digits = [torch.finfo(s.dtype).eps if s.dtype.is_floating_point else 0 for s in self.seen]
        least = _ULPS * torch.tensor(digits, dtype=torch.float64)
        grown = (after > _GROWTH * before) & (after > least)
        self.moved |= grown[:, None] & self.bits_moved
        places = grown.nonzero().flatten()
        return int(places[0]) if len(places) else None


def tolerance(dtype: torch.dtype) -> float:
    """Relative change of another sample's values that counts as rounding."""
    if not dtype.is_floating_point:
        return _TOLERANCE[torch.float64]
    return _TOLERANCE.get(dtype, _COARSE_TOLERANCE)


def kept_moved(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names of what two passes left unlike each other, beyond rounding."""
    return [
        name
        for name in sorted({*first, *second})
        if name not in first or name not in second or _unlike(first[name], second[name])
    ]


def _unlike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape:
        if not a.is_floating_point():
            return not torch.equal(a, b)
        most = tolerance(a.dtype)
        return not torch.allclose(a.double(), b.double(), rtol=most, atol=0.0, equal_nan=True)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return not (a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))
    tensors = isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor)
    return tensors or not (a == b or (a != a and b != b))
