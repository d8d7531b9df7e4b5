"""Does the loader's ``collate_fn`` mix records? One record is exchanged; no other row may move.

MixUp in a ``collate_fn``, or a normalisation by the batch's own statistics, spreads a record over
the rows of others before any model sees them. Each row is clipped to the bound C, so one record
then moves the sum by the share of every row that it has entered, and the sensitivity is not C.

Batches of three records are collated, each with one record exchanged, under the same seeds. Rows
may come in another order (sorted by length): the sum over rows does not depend on their order. So
all rows but one must be found again, bit for bit, whole across all tensors of the batch.
"""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Callable, Sequence, Sized
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, IterableDataset, default_collate

from dpkernels.engine.capture.refusals import NotPerSample
from dpkernels.engine.trial import random_numbers
from dpkernels.engine.trial.collated import (
    RECORDS,
    Collated,
    Layout,
    Row,
    differ,
    found_again,
    moved,
    resized,
)

#: seeds for a collate_fn that draws: MixUp may draw the identity as its permutation, or leave out
_SEEDS = 12


def refuse_mixing_collate(data_loader: DataLoader, batch_first: bool = True) -> None:
    """Try the ``collate_fn`` of a loader on a few records; refuse one that mixes them.

    At most four records are read, by ``dataset[i]``, once each; the ``collate_fn`` gets copies. The
    global generators of torch (CPU), numpy and Python are left as they were. Nothing is read where
    the ``collate_fn`` is PyTorch's default, and nothing is found where the loader has no map-style
    dataset of three records, or where reading or collating raises.

    Args:
        data_loader: a loader whose sampler draws batches of records.
        batch_first: whether tensors have their records on the first axis; False: on the second.

    Raises:
        NotPerSample: (a ValueError) the row of a record moves when another record is exchanged.

    Warns:
        UserWarning: rows are padded to the longest record of the batch; a tensor or number moves
            that belongs to no record; or the ``collate_fn`` draws in a way that no seed repeats.
    """
    dataset, collate = data_loader.dataset, _unwrapped(data_loader.collate_fn)
    if collate is None or collate is default_collate or data_loader.batch_sampler is None:
        return
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        return
    with random_numbers.kept():
        try:
            trial = _Trial(_records_of(dataset), collate, 0 if batch_first else 1)
            trial.run()
        except Exception:  # training shows what a dataset or collate_fn raises, if it raises there
            return
    name = f"data_loader.collate_fn {_name_of(collate)}"
    if not trial.comparable:
        warnings.warn(
            f"{name}: calls under the same seeds draw other random numbers or keep a state, so the "
            "trial cannot tell whether records are mixed; check that no row of the batch depends "
            "on two records",
            stacklevel=3,
        )
    elif trial.mixed is not None:
        raise NotPerSample(
            f"{name}: {trial.mixed}, so records are mixed before the model sees them, and one "
            "record moves the sum by more than max_grad_norm; expected rows that depend on one "
            "record each. Transform every record by itself in the dataset's __getitem__ (MixUp, "
            "CutMix and statistics over the batch cannot be private with this bound)"
        )
    if trial.padded is not None:
        warnings.warn(
            f"{name}: {trial.padded} is padded to the longest record of the batch; let no record's "
            "loss depend on padding, or pad to a fixed length",
            stacklevel=3,
        )
    if trial.comparable and trial.loose:
        first, *others = trial.loose
        warnings.warn(
            f"{name}: {first}{f' (and {len(others)} more)' if others else ''} has no row for each "
            "record, and moves when one is exchanged; a model or loss that uses such a value "
            "couples records",
            stacklevel=3,
        )


class _Trial:
    """What batches show in which one record was exchanged for another.

    Args:
        records: three records, or four.
        collate: the loader's own.
        axis: where tensors are likely to have their records.
    """

    def __init__(self, records: list[Any], collate: Callable[[list[Any]], Any], axis: int):
        self._records, self._collate, self._axis = records, collate, axis
        #: a clause on the first row that moved
        self.mixed: str | None = None
        #: the first leaf whose rows are as long as the longest record
        self.padded: str | None = None
        #: leaves that belong to no record, and move
        self.loose: dict[str, None] = {}
        self._compared = self._drawn_by_record = False

    @property
    def comparable(self) -> bool:
        """Whether batches could be compared: equal seeds gave equal draws."""
        return self._compared and not self._drawn_by_record

    def run(self) -> None:
        """Collate and compare; what the ``collate_fn`` raises is not caught."""
        batch = self._records[:RECORDS]
        base = self._collated(batch, 0)
        if differ(base, self._collated(batch, 0)):
            return
        exchanged = [self._exchanged(place, 0) for place in range(RECORDS)]
        four = self._collated([*self._records, self._records[0]][: RECORDS + 1], 0)
        layout = Layout([base, *exchanged], four, self._axis)
        for place, other in enumerate(exchanged):
            self._compare(layout, base, other, place)
        random_numbers.seed_all(0)
        draws = base.drawn != random_numbers.states()
        for seed in range(1, _SEEDS) if draws else ():
            place = seed % RECORDS
            base = self._collated(batch, seed)
            self._compare(layout, base, self._exchanged(place, seed), place)

    def _exchanged(self, place: int, seed: int) -> Collated:
        """The batch of three with another record in one place."""
        batch = self._records[:RECORDS]
        batch[place] = self._records[place - 1]
        return self._collated(batch, seed)

    def _collated(self, records: Sequence[Any], seed: int) -> Collated:
        """One batch, collated under a seed from copies of its records."""
        with _CompactCopies():
            copies = [copy.deepcopy(record) for record in records]
        collate = copy.copy(self._collate)  # what it sets on itself, the loader's own does not get
        random_numbers.seed_all(seed)
        batch = collate(copies)
        return Collated(batch, random_numbers.states())

    def _compare(self, layout: Layout, base: Collated, other: Collated, exchanged: int) -> None:
        """Note what moved between two batches.

        Where one batch drew more numbers than the other, rows move that are not mixed. No two
        batches of this ``collate_fn`` can then be compared, unless the rows are longer too: the
        length of all rows may decide on the number of draws, and equal lengths can be compared.
        """
        before, after = layout.rows(base), layout.rows(other)
        if base.drawn != other.drawn:
            others = [pair for i, pair in enumerate(zip(before, after)) if i != exchanged]
            longer = self._note_padding(others)
            self._drawn_by_record = self._drawn_by_record or not longer
            return
        self._compared = True
        self.loose |= dict.fromkeys(layout.loose_that_moved(base, other))
        pairs = found_again(before, after)
        if pairs is None:
            faults = enumerate(moved(*pair) for pair in zip(before, after))
            record, leaf = next((j, leaf) for j, leaf in faults if leaf and j != exchanged)
            self.mixed = self.mixed or (
                f"{leaf}: the row of record {record} moves when record {exchanged} is exchanged"
            )
            return
        if len(pairs) == RECORDS:
            del pairs[exchanged]
        self._note_padding(pairs)

    def _note_padding(self, pairs: Sequence[tuple[Row, Row]]) -> bool:
        """Note the first leaf that has another length in pairs of one record's rows."""
        found = next((name for pair in pairs if (name := resized(*pair))), None)
        self.padded = self.padded or found
        return found is not None


def _records_of(dataset: Any) -> list[Any]:
    """Three or four records, the same at every call; ValueError where there are fewer."""
    random_numbers.seed_all(0)
    places = random.Random(0).sample(range(len(dataset)), min(RECORDS + 1, len(dataset)))
    if len(places) < RECORDS:
        raise ValueError(f"dataset: has {len(places)} records; expected at least {RECORDS}")
    return [dataset[place] for place in places]


class _CompactCopies(TorchFunctionMode):
    """Deep copies of tensors copy their values alone; otherwise all memory that a view looks at.

    A row of a TensorDataset is such a view, and its memory the whole dataset.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__deepcopy__ and type(args[0]) is torch.Tensor:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def _unwrapped(collate: Any) -> Any:
    """The user's own ``collate_fn``, below Opacus' wrapper that makes empty batches."""
    while hasattr(collate, "wrapped_collator_fn"):
        collate = collate.wrapped_collator_fn
    return collate


def _name_of(collate: Any) -> str:
    """The qualified name of a function, or of an object's class."""
    while isinstance(collate, functools.partial):
        collate = collate.func
    named = collate if hasattr(collate, "__qualname__") else type(collate)
    return f"{named.__module__}.{named.__qualname__}"
