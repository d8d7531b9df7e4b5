"""The trial of a ``collate_fn``: what it reads, what it leaves alone, and when it cannot tell."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from opacus.data_loader import wrap_collate_with_empty
from torch.utils.data import IterableDataset, TensorDataset, default_collate

from tests.engine.hard_cases.collates import Texts, mix_up, padded, stacked, tried
from tests.engine.support import images


class Counting:
    """A state of its own, in place."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, records: list[Any]) -> torch.Tensor:
        self.calls.append(len(records))
        return stacked(records)[0] * len(self.calls)


class OwnGenerator:
    """Sets up its generator at the first call, as transformers' collators do."""

    generator: torch.Generator | None = None

    def __call__(self, records: list[Any]) -> torch.Tensor:
        self.generator = self.generator or torch.Generator().manual_seed(3)
        x, _ = stacked(records)
        return x + torch.randn(x.shape, generator=self.generator)


def drawn_by_the_system(records: list[Any]) -> torch.Tensor:
    x, _ = stacked(records)
    return x + torch.from_numpy(np.random.default_rng().standard_normal(x.shape))


def as_many_draws_as_tokens(records: list[Any]) -> torch.Tensor:
    """Each row is one record's, but a longer record moves on the stream for those that follow."""
    rows = [r["ids"][[random.random() < 0.5 for _ in r["ids"]]].sum() for r in records]
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("collate", "dataset"),
    [
        (Counting(), None),
        (drawn_by_the_system, None),
        (as_many_draws_as_tokens, Texts()),
    ],
)
def test_draws_that_no_seed_repeats_leave_the_verdict_open(collate: Any, dataset: Any) -> None:
    (message,) = tried(collate, dataset)
    assert "cannot tell whether records are mixed" in message


def test_what_a_collate_fn_sets_on_itself_is_not_set_by_the_trial() -> None:
    """A generator made in the main process would be the same in every worker."""
    collate = OwnGenerator()
    assert tried(collate) == []
    assert collate.generator is None


def raising(records: list[Any]) -> torch.Tensor:
    if len(records) != 4:
        raise ValueError("exactly four, please")
    return stacked(records)[0]


class Raising(Texts):
    def __getitem__(self, i: int) -> dict[str, Any]:
        raise RuntimeError("only in a worker")


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield torch.ones(2)


@pytest.mark.parametrize(
    ("collate", "dataset", "batch_size"),
    [
        (raising, None, 4),
        (padded, Raising(), 4),
        (mix_up, images(2), 2),
        (mix_up, Stream(), 4),
        (lambda record: record, images(12), None),
    ],
)
def test_where_nothing_can_be_tried_nothing_is_found(
    collate: Any, dataset: Any, batch_size: int | None
) -> None:
    assert tried(collate, dataset, batch_size=batch_size) == []


def in_place(records: list[Any]) -> torch.Tensor:
    for record in records:
        record["ids"].zero_()
        record["label"] = -1
    return padded(records)["label"]


def test_records_are_read_once_and_left_as_they_were() -> None:
    dataset, untouched = Texts(), Texts()
    tried(in_place, dataset)
    assert len(dataset.reads) == len(set(dataset.reads)) == 4
    for record, other in zip(dataset.records, untouched.records):
        assert record["label"] == other["label"]
        assert torch.equal(record["ids"], other["ids"])


def test_the_default_collate_fn_is_not_tried() -> None:
    dataset = Texts()
    for collate in (None, default_collate, wrap_collate_with_empty(collate_fn=default_collate)):
        assert tried(collate, dataset) == []
    assert dataset.reads == []


def test_a_record_is_copied_without_the_dataset_it_is_a_view_of() -> None:
    """A deep copy of a row takes along the memory that it lies in."""
    sizes = []

    def collate(records: list[Any]) -> torch.Tensor:
        sizes.extend(x.untyped_storage().nbytes() for x, _ in records)
        return stacked(records)[0]

    assert tried(collate, images(12)) == []
    assert set(sizes) == {3 * 8 * 8 * 4}


def test_random_states_are_left_as_they_were() -> None:
    class Drawing(TensorDataset):
        def __getitem__(self, i: int) -> Any:
            x, y = super().__getitem__(i)
            return x * random.random() + np.random.rand() + torch.rand(()), y  # noqa: NPY002

    def draws() -> list[float]:
        return [random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002

    def seed() -> None:
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        torch.manual_seed(5)

    seed()
    expected = draws()
    seed()
    assert tried(lambda records: default_collate(records), Drawing(*images(12).tensors)) == []
    assert draws() == expected
    seed()
    with pytest.raises(ValueError, match="mix_up"):
        tried(mix_up, Drawing(*images(12).tensors))
    assert draws() == expected
