"""Collated batches, compared row by row: each record's leaves, wherever the batch has them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.utils.rnn import unpack_sequence

from dpkernels.engine.capture.layer import is_packed

#: how a leaf is reached from the batch, piece by piece: ("batch", "['image']", "[0]")
Path: TypeAlias = tuple[str, ...]
#: tensor, number, str or bytes
Leaf: TypeAlias = Any
#: the leaves of one record by their names
Row: TypeAlias = dict[str, Leaf]

#: records of a batch; three show whether the rows of two others move
RECORDS = 3


class Collated:
    """The leaves of a collated batch.

    Args:
        batch: nested dicts, lists, tuples, dataclasses and packed sequences.
        drawn: what the generators held after the batch was made.
    """

    def __init__(self, batch: Any, drawn: tuple[Any, ...]):
        self.drawn = drawn
        self.leaves: dict[Path, Leaf] = {}
        #: lengths of lists and tuples
        self.lengths: dict[Path, int] = {}
        self._walk(("batch",), batch)

    def _walk(self, path: Path, tree: Any) -> None:
        if is_packed(tree):
            tree = unpack_sequence(tree)
        if isinstance(tree, np.ndarray) and tree.dtype.kind in "biufc":
            tree = torch.from_numpy(np.ascontiguousarray(tree))
        if isinstance(tree, torch.Tensor):
            if tree.layout == torch.strided and not tree.is_nested:
                self.leaves[path] = tree.detach().as_subclass(torch.Tensor)
        elif isinstance(tree, (bool, int, float, complex, np.generic, str, bytes)):
            self.leaves[path] = tree
        elif isinstance(tree, Mapping):
            for key, value in tree.items():
                self._walk((*path, f"[{key!r}]"), value)
        elif dataclasses.is_dataclass(tree):
            for field in dataclasses.fields(tree):
                self._walk((*path, f".{field.name}"), getattr(tree, field.name))
        elif isinstance(tree, (list, tuple, np.ndarray)):
            self.lengths[path] = len(tree)
            for i, value in enumerate(tree):
                self._walk((*path, f"[{i}]"), value)


class Layout:
    """Where batches have their records: on an axis of a tensor, or as the elements of a list.

    That axis, or list, is as long as the batch, or a multiple (adjacent rows are then one
    record's). Batches of three alone could not tell records from colours.

    Args:
        threes: batches of three records.
        four: a batch of four.
        axis: the axis that is looked at first.
    """

    def __init__(self, threes: Sequence[Collated], four: Collated, axis: int):
        def counts(lengths: Sequence[int], larger: int) -> bool:
            alike = len(set(lengths)) == 1
            return alike and lengths[0] > 0 and lengths[0] * (RECORDS + 1) == larger * RECORDS

        shared = set.intersection(*(set(batch.lengths) for batch in [*threes, four]))
        self._lists = {
            path
            for path in shared
            if counts([batch.lengths[path] for batch in threes], four.lengths[path])
        }
        #: by leaf, the axis of its records
        self._axes: dict[Path, int] = {}
        #: leaves that belong to no record
        self._loose: list[Path] = []
        for path in threes[0].leaves:
            if self._list_above(path) or not all(path in batch.leaves for batch in threes):
                continue
            shapes = [getattr(batch.leaves.get(path), "shape", ()) for batch in [*threes, four]]
            ranks = {len(shape) for shape in shapes}
            places = sorted(range(min(ranks)), key=lambda place: place != axis)
            for place in places if len(ranks) == 1 else []:
                *lengths, larger = (shape[place] for shape in shapes)
                if counts(lengths, larger):
                    self._axes[path] = place
                    break
            else:
                self._loose.append(path)

    def _list_above(self, path: Path) -> Path | None:
        """The outermost list of records that a leaf stands in."""
        above = (path[:depth] for depth in range(1, len(path)))
        return next((prefix for prefix in above if prefix in self._lists), None)

    def rows(self, batch: Collated) -> list[Row]:
        """By record, the leaves of its row."""
        rows: list[Row] = [{} for _ in range(RECORDS)]
        for path, leaf in batch.leaves.items():
            above = self._list_above(path)
            if above is not None:
                own, below = path[len(above)], path[len(above) + 1 :]
                record, place = divmod(int(own[1:-1]), batch.lengths[above] // RECORDS)
                rows[record]["".join([*above, f"[...{place or ''}]", *below])] = leaf
            elif path in self._axes:
                parts = leaf.tensor_split(RECORDS, dim=self._axes[path])
                for row, part in zip(rows, parts):
                    row["".join(path)] = part
        return rows

    def loose_that_moved(self, batch: Collated, other: Collated) -> list[str]:
        """The tensors and numbers that belong to no record and differ between two batches."""
        return [
            "".join(path)
            for path in self._loose
            if not isinstance(leaf := batch.leaves.get(path), (str, bytes))
            and not _same(leaf, other.leaves.get(path))
        ]


def found_again(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[Row, Row]] | None:
    """Rows of one batch with what they are in another, in any order, if that is all rows but one.

    The order that both batches have is tried first.
    """
    for order in itertools.permutations(after):
        pairs = [pair for pair in zip(before, order) if moved(*pair) is None]
        if len(pairs) >= RECORDS - 1:
            return pairs
    return None


def moved(before: Row, after: Row) -> str | None:
    """The first leaf of a row that moved, beyond the length of its padding."""
    if before.keys() != after.keys():
        return min(before.keys() ^ after.keys())
    return next((name for name in before if not _same_but_padding(before[name], after[name])), None)


def resized(before: Row, after: Row) -> str | None:
    """The first leaf of a row that has another shape."""
    shapes = ((name, getattr(before[name], "shape", ())) for name in before if name in after)
    return next(
        (name for name, shape in shapes if getattr(after[name], "shape", ()) != shape), None
    )


def differ(first: Collated, second: Collated) -> bool:
    """Whether two batches differ in anything."""
    if first.leaves.keys() != second.leaves.keys():
        return True
    return not all(_same(leaf, second.leaves[path]) for path, leaf in first.leaves.items())


def _same(first: Leaf, second: Leaf) -> bool:
    """Whether two leaves are equal bit for bit; numbers that are both NaN are equal."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        return torch.equal(_bits(first), _bits(second))
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        return False
    return type(first) is type(second) and (
        first == second or (first != first and second != second)
    )


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.resolve_conj().contiguous().reshape(-1).view(torch.uint8)


def _same_but_padding(first: Leaf, second: Leaf) -> bool:
    """Whether two leaves are equal, or would be without padding on the left, right or both sides.

    What stands in the padding is not looked at: masks and positions have no constant there, and
    another record's values would also show where the lengths overlap. There, rounding may depend on
    the shape.
    """
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return _same(first, second)
    if first.shape == second.shape or first.ndim != second.ndim:
        return _same(first, second)
    offsets = []
    for a, b in zip(first.shape, second.shape):
        extra = abs(a - b)
        offsets.append(sorted({0, extra, extra // 2, extra - extra // 2}))
    return any(_close(*_overlap(first, second, starts)) for starts in itertools.product(*offsets))


def _overlap(
    first: torch.Tensor, second: torch.Tensor, starts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both tensors cut to the shorter length of each axis, the longer one from its start on."""
    for axis, start in enumerate(starts):
        length = min(first.shape[axis], second.shape[axis])
        first = first.narrow(axis, start if first.shape[axis] > length else 0, length)
        second = second.narrow(axis, start if second.shape[axis] > length else 0, length)
    return first, second


def _close(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape are equal, but for rounding."""
    if first.dtype != second.dtype or not first.is_floating_point() or not first.numel():
        return _same(first, second)
    scale = float(first.nan_to_num(0.0, 0.0, 0.0).abs().max())
    rounding = torch.finfo(first.dtype).eps ** 0.5 * scale
    return torch.allclose(first.double(), second.double(), rtol=0.0, atol=rounding, equal_nan=True)
