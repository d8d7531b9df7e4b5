"""Poisons: what a trial does to some samples of a batch, to see whether others move."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)

from dpkernels.engine.capture.argument_copies import argument_copy
from dpkernels.engine.capture.layer import is_packed, leaves_of
from dpkernels.engine.trial.batch_rows import BatchRows, dense, owners

#: every float of the sample is NaN; in a pass without other poisons, as max(NaN, 1e6) > 10 is
#: False, so that a NaN would hide a branch on magnitudes
NAN = "nan"
#: the sample has the values of a sample that is not poisoned
EXCHANGED = "exchanged"
#: the sample is zero
BLANK = "blank"
#: the sample has the values of a sample that is not poisoned, each float far above the largest
LARGE = "large"
#: the sample is exchanged, and the second half of its labels is what PyTorch's losses ignore
IGNORED = "ignored"

#: LARGE values over the batch's largest
_FACTOR = 1000.0
_IGNORE_INDEX = -100


@dataclass(frozen=True)
class Poison:
    """Which samples are poisoned, and by what.

    Attributes:
        samples: bool [samples]; some are poisoned, and some are not.
        kinds: dealt out in turn to the poisoned samples.
        turn: the kind with which the deal begins, and how far from one another samples exchanged
            are.
        factor: LARGE values over the batch's largest.
        keep_lengths: whether integers and truths stay that equal the sample's first or last: a
            length by itself, a mask of those that count, padding. A model may want lengths sorted.
    """

    samples: torch.Tensor
    kinds: tuple[str, ...]
    turn: int = 0
    factor: float = _FACTOR
    keep_lengths: bool = False

    def of(self, *kinds: str) -> Poison:
        """The same samples, poisoned by other kinds."""
        return replace(self, kinds=kinds)

    def with_lengths(self) -> Poison:
        """The same, but a vector of one integer per sample stays."""
        return replace(self, keep_lengths=True)

    def nobody(self) -> Poison:
        """A poison of nobody."""
        return replace(self, samples=torch.zeros_like(self.samples))

    def __str__(self) -> str:
        """The poisoned samples, as the subject of a sentence, and its verb."""
        poisoned = self.samples.nonzero().flatten().tolist()
        if len(poisoned) == 1:
            return f"sample {poisoned[0]} is"
        more = ", ..." if len(poisoned) > 3 else ""
        return f"samples {', '.join(map(str, poisoned[:3]))}{more} are"

    def deal(self) -> Deal:
        """What becomes of the poisoned samples."""
        moved, clean = (which.nonzero().flatten() for which in (self.samples, ~self.samples))
        sources = clean[(torch.arange(len(moved)) + self.turn) % len(clean)]
        kinds = len(self.kinds)
        turns = {
            kind: moved[(number - self.turn) % kinds :: kinds]
            for number, kind in enumerate(self.kinds)
        }
        return Deal(moved, sources, turns, self.factor, self.keep_lengths)


@dataclass(frozen=True)
class Deal:
    """What becomes of the rows of a batch that are poisoned, which are given by their places.

    Attributes:
        moved: places of all poisoned rows.
        sources: for each of them the place of the row whose values it gets, which is not poisoned.
        turns: by kind, places of the rows that get it.
        factor, keep_lengths: see :class:`Poison`.
    """

    moved: torch.Tensor
    sources: torch.Tensor
    turns: dict[str, torch.Tensor]
    factor: float
    keep_lengths: bool

    def steps(self, packed: PackedSequence) -> Deal:
        """The same for the steps of a packed sequence; an exchanged step is its source's first."""
        owner, count = owners(packed), int(packed.batch_sizes[0])
        first = torch.empty(count, dtype=torch.long)
        first[owner[:count]] = torch.arange(count)
        source = torch.arange(count)
        source[self.moved] = self.sources
        moved = torch.isin(owner, self.moved).nonzero().flatten()
        turns = {
            kind: torch.isin(owner, samples).nonzero().flatten()
            for kind, samples in self.turns.items()
        }
        return replace(self, moved=moved, sources=first[source[owner[moved]]], turns=turns)


class Twins:
    """Copies of a batch, poisoned.

    Args:
        batch: nested arguments of a model.
        at: where the batch has its samples.
    """

    def __init__(self, batch: Any, at: BatchRows) -> None:
        self._leaves, self._spec = tree_flatten(batch, is_leaf=is_packed)
        self._labels = label_places(batch, at)
        self._at = at

    def poisoned(self, poison: Poison | None) -> Any:
        """A copy of the batch: tensors are detached, the rest as by :func:`argument_copy`.

        Args:
            poison: None copies only.
        """
        deal = None if poison is None else poison.deal()
        twins = [self._twin(place, leaf, deal) for place, leaf in enumerate(self._leaves)]
        return tree_unflatten(twins, self._spec)

    def _twin(self, place: int, leaf: Any, deal: Deal | None) -> Any:
        at = self._at
        if isinstance(leaf, PackedSequence):
            data = _copied(leaf.data)
            if deal is not None:
                _spoil(data.detach()[:, None], deal.steps(leaf), is_labels=False)
            return PackedSequence(data, *leaf[1:])
        if not isinstance(leaf, torch.Tensor):
            return argument_copy(leaf, lambda tensor: self._spoil_rows(tensor, deal))
        twin = _copied(leaf)
        if deal is not None and at.holds(leaf):
            values = dense(twin.detach())
            self._spoil_rows(values, deal, is_labels=place in self._labels)
            if leaf.layout != torch.strided:
                twin = values.to_sparse(layout=leaf.layout).requires_grad_(leaf.requires_grad)
        return twin

    def _spoil_rows(self, values: torch.Tensor, deal: Deal | None, is_labels: bool = False) -> None:
        """Poison a tensor in place, if it is batched."""
        at = self._at
        if deal is not None and at.holds(values):
            rows = values.movedim(at.axis, 0).unflatten(0, (at.samples, at.views))
            _spoil(rows, deal, is_labels)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with no graph; where the tensor is no leaf, no leaf: a model may write into it."""
    copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return copy if tensor.is_leaf else copy.clone()


def label_places(batch: Any, at: BatchRows) -> list[int]:
    """Places of the leaves that may be labels, several integers for each sample.

    Where arguments or keys are called labels or targets, those; else all but the first tensor.
    """
    leaves, _ = tree_flatten_with_path(batch, is_leaf=is_packed)
    batched = [place for place, (_, leaf) in enumerate(leaves) if at.holds(leaf)]
    several = [p for p in batched if _is_whole(leaves[p][1]) and leaves[p][1].numel() > at.rows]
    named = [p for p in several if any(w in keystr(leaves[p][0]) for w in ("label", "target"))]
    return named or [place for place in several if place != batched[0]]


def has_floats(batch: Any, at: BatchRows) -> bool:
    """Whether a batched tensor of a batch holds floats, which alone can be NaN or large."""
    return any(
        is_packed(leaf) or (at.holds(leaf) and not _is_whole(leaf) and leaf.dtype != torch.bool)
        for leaf in leaves_of(batch)
    )


def _is_whole(leaf: torch.Tensor) -> bool:
    return not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool)


def _spoil(rows: torch.Tensor, deal: Deal, is_labels: bool) -> None:
    """Poison a tensor in place, [rows of the deal, ...]."""
    if not rows.numel() or rows.layout != torch.strided:
        return
    floats = rows.is_floating_point() or rows.is_complex()
    if NAN in deal.turns:
        if floats:
            rows[deal.moved] = torch.nan
        return
    lengths = deal.keep_lengths and not floats
    given = rows.clone() if lengths else rows
    large = deal.turns.get(LARGE) if floats else None
    scale = 1.0 if large is None else _largest(rows)
    rows[deal.moved] = rows[deal.sources]
    if BLANK in deal.turns and not lengths:
        rows[deal.turns[BLANK]] = 0
    if large is not None:
        values = rows[large].to(torch.promote_types(rows.dtype, torch.float64)) + scale
        top = torch.finfo(rows.dtype).max / 8
        rows[large] = (values * min(deal.factor, top / scale)).to(rows.dtype)
    if IGNORED in deal.turns and is_labels:
        flat = rows[deal.turns[IGNORED]].flatten(1)
        flat[:, flat.shape[1] // 2 :] = _IGNORE_INDEX
        rows[deal.turns[IGNORED]] = flat.view(-1, *rows.shape[1:])
    if lengths:
        still = (given == given[..., :1]) | (given == given[..., -1:])
        stays = still[deal.moved] | still[deal.sources]
        rows[deal.moved] = torch.where(stays, given[deal.moved], rows[deal.moved])


def _largest(values: torch.Tensor) -> float:
    """The largest size of a finite value; 1 where all are zero."""
    return float(values.abs().nan_to_num_(0.0, 0.0, 0.0).max()) or 1.0
