"""Each kind of poison does what it says, to the poisoned samples alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from dpkernels.engine.trial.batch_rows import BatchRows, owners
from dpkernels.engine.trial.poisons import (
    BLANK,
    EXCHANGED,
    IGNORED,
    LARGE,
    NAN,
    Poison,
    Twins,
    has_floats,
    label_places,
)

KINDS = (EXCHANGED, BLANK, LARGE, IGNORED)
SIDE = torch.tensor([False, True, True, False, True, False])
AT = BatchRows(6, 1, 0)


def poisoned(batch: Any, at: BatchRows, poison: Poison | None) -> Any:
    return Twins(batch, at).poisoned(poison)


def rows(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Another value everywhere, none of them 0."""
    values = torch.arange(1, 1 + 6 * torch.Size(shape).numel()).reshape(6, *shape)
    return values % 2 == 0 if dtype == torch.bool else values.to(dtype)


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
WHOLE = [torch.int32, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", FLOATS + WHOLE)
@pytest.mark.parametrize("kind", [NAN, *KINDS])
def test_samples_that_are_not_poisoned_stay(dtype: torch.dtype, kind: str) -> None:
    given = rows(dtype, 2, 3)
    found = poisoned(given, AT, Poison(SIDE, (kind,)))
    assert found.dtype == dtype
    assert torch.equal(found[~SIDE], given[~SIDE])
    assert torch.equal(given, rows(dtype, 2, 3)), "the batch itself is left alone"


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_is_in_every_float(dtype: torch.dtype) -> None:
    assert bool(poisoned(rows(dtype, 2), AT, Poison(SIDE, (NAN,)))[SIDE].isnan().all())


@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("shape", [(), (3,)])
def test_nan_leaves_integers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    given = rows(dtype, *shape)
    assert torch.equal(poisoned(given, AT, Poison(SIDE, (NAN,))), given)


@pytest.mark.parametrize("dtype", FLOATS + WHOLE)
def test_blank_is_zero(dtype: torch.dtype) -> None:
    assert not bool(poisoned(rows(dtype, 2), AT, Poison(SIDE, (BLANK,)))[SIDE].any())


@pytest.mark.parametrize("dtype", FLOATS + WHOLE)
@pytest.mark.parametrize("turn", [0, 1, 5])
def test_sources_of_an_exchange_are_not_poisoned(dtype: torch.dtype, turn: int) -> None:
    given = rows(dtype, 3)
    poison = Poison(SIDE, (EXCHANGED,), turn)
    found, deal = poisoned(given, AT, poison), poison.deal()
    assert torch.equal(deal.moved, SIDE.nonzero().flatten())
    assert not bool(SIDE[deal.sources].any())
    assert torch.equal(found[SIDE], given[deal.sources])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_large_is_far_above_the_largest_and_finite(dtype: torch.dtype, factor: float) -> None:
    given = rows(dtype, 2)
    large = poisoned(given, AT, Poison(SIDE, (LARGE,), factor=factor))[SIDE]
    assert bool(large.isfinite().all())
    assert float(large.abs().min()) > min(0.99 * factor * float(given.abs().max()), 8000.0)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_large_is_large_at_any_scale(scale: float) -> None:
    given = rows(torch.float32, 2) * scale
    large = poisoned(given, AT, Poison(SIDE, (LARGE,)))[SIDE]
    assert bool(large.isfinite().all())
    assert float(large.abs().min()) > 999 * float(given.max())


def test_large_where_values_are_not_finite_or_zero() -> None:
    given = torch.zeros(6, 2)
    assert bool((poisoned(given, AT, Poison(SIDE, (LARGE,)))[SIDE] == 1000).all())
    given[0] = torch.inf
    found = poisoned(given, AT, Poison(SIDE, (LARGE,)))
    assert torch.equal(found[~SIDE], given[~SIDE])


def test_large_integers_are_exchanged() -> None:
    given = rows(torch.int64, 2)
    exchange = poisoned(given, AT, Poison(SIDE, (EXCHANGED,)))
    assert torch.equal(poisoned(given, AT, Poison(SIDE, (LARGE,))), exchange)


def test_half_of_a_samples_labels_is_ignored() -> None:
    batch = {"x": rows(torch.float32, 4), "labels": rows(torch.int64, 4)}
    found = poisoned(batch, AT, Poison(SIDE, (IGNORED,)))
    exchange = poisoned(batch, AT, Poison(SIDE, (EXCHANGED,)))
    assert torch.equal(found["x"], exchange["x"])
    assert torch.equal(found["labels"][:, :2], exchange["labels"][:, :2])
    assert bool((found["labels"][SIDE, 2:] == -100).all())


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("turn", range(5))
def test_every_kind_is_dealt_in_turn(count: int, turn: int) -> None:
    kinds = KINDS[:count]
    side = torch.arange(32) % 2 == 1
    deal = Poison(side, kinds, turn).deal()
    assert set(deal.turns) == set(kinds)
    assert all(len(rows) for rows in deal.turns.values())
    together = torch.cat(list(deal.turns.values())).sort().values
    assert torch.equal(together, side.nonzero().flatten()), "each gets one kind, nobody else any"


def test_few_samples_get_other_kinds_in_other_turns() -> None:
    side = torch.tensor([False, True])
    got = {
        kind
        for turn in range(len(KINDS))
        for kind, rows in Poison(side, KINDS, turn).deal().turns.items()
        if len(rows)
    }
    assert got == set(KINDS)


@pytest.mark.parametrize("kind", [NAN, *KINDS])
def test_views_of_a_sample_are_poisoned_together(kind: str) -> None:
    at, side = BatchRows(6, 2, 0), torch.tensor([False, True, False])
    given = rows(torch.float32, 3)
    found = poisoned(given, at, Poison(side, (kind,)))
    assert torch.equal(found[[0, 1, 4, 5]], given[[0, 1, 4, 5]])
    assert not bool((found[[2, 3]] == given[[2, 3]]).any())
    if kind == EXCHANGED:
        assert torch.equal(found[2:4], given[:2])


@pytest.mark.parametrize("kind", [NAN, *KINDS])
def test_samples_on_the_second_axis(kind: str) -> None:
    given = rows(torch.float32, 4).T.contiguous()
    found = poisoned(given, BatchRows(6, 1, 1), Poison(SIDE, (kind,)))
    assert torch.equal(
        found.nan_to_num(7.5), poisoned(given.T, AT, Poison(SIDE, (kind,))).T.nan_to_num(7.5)
    )


@pytest.mark.parametrize("kind", [NAN, *KINDS])
@pytest.mark.parametrize("lengths", [(3, 2, 2), (1, 3, 2), (2, 2, 2)])
def test_packed_sequences(kind: str, lengths: tuple[int, ...]) -> None:
    sequences = [torch.arange(1.0, n + 1)[:, None] + 10 * i for i, n in enumerate(lengths)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    at, side = BatchRows(3, 1, 0), torch.tensor([False, True, False])
    found = poisoned(packed, at, Poison(side, (kind,)))
    padded, after = pad_packed_sequence(found, batch_first=True)
    assert tuple(after.tolist()) == lengths
    for i, sequence in enumerate(sequences):
        same = bool((padded[i, : lengths[i]] == sequence).any())
        assert same == (not side[i]), f"sample {i}"
    assert owners(packed).bincount().tolist() == list(lengths)


def test_lengths_stay_where_they_are_to_stay() -> None:
    batch = (rows(torch.float32, 2), torch.arange(6), torch.arange(6.0), rows(torch.int64, 4))
    kept = poisoned(batch, AT, Poison(SIDE, (EXCHANGED,)).with_lengths())
    assert torch.equal(kept[1], batch[1])
    assert not torch.equal(kept[2], batch[2])
    assert not torch.equal(kept[3], batch[3])
    assert not torch.equal(poisoned(batch, AT, Poison(SIDE, (EXCHANGED,)))[1], batch[1])


def test_what_has_no_row_for_each_sample_stays() -> None:
    batch: Any = {"x": rows(torch.float32, 2), "more": [torch.ones(5), torch.tensor(2.0), 3, "a"]}
    found = poisoned(batch, AT, Poison(SIDE, (NAN,)))
    assert torch.equal(found["more"][0], torch.ones(5))
    assert found["more"][1:] == batch["more"][1:]


def test_copies_keep_whether_gradients_are_wanted_and_not_the_graph() -> None:
    leaf = rows(torch.float32, 2).requires_grad_()
    found = poisoned([leaf * 2, leaf.detach()], AT, Poison(SIDE, (NAN,)))
    assert [t.requires_grad for t in found] == [True, False]
    found[0].sum().backward()
    assert leaf.grad is None


def test_nobody_is_poisoned() -> None:
    given = rows(torch.float32, 2)
    for poison in (None, Poison(SIDE, KINDS).nobody()):
        found = poisoned(given, AT, poison)
        assert torch.equal(found, given)
        assert found.data_ptr() != given.data_ptr()


def test_labels_are_found_by_name_else_behind_the_first_tensor() -> None:
    x, y, flags = rows(torch.int64, 4), rows(torch.int64, 4), rows(torch.int64)
    assert label_places((x, y, flags), AT) == [1]
    assert label_places({"ids": x, "mask": y, "labels": y}, AT) == [2]
    assert label_places({"target": y, "ids": x}, AT) == [0]
    assert label_places((rows(torch.float32, 4), rows(torch.float32, 4)), AT) == []


def test_floats_of_a_batch() -> None:
    assert has_floats([rows(torch.float16, 2)], AT)
    assert has_floats(pack_sequence([torch.ones(2, 1)]), AT)
    assert not has_floats([rows(torch.int64, 2), torch.ones(5)], AT)
    assert not has_floats([rows(torch.bool, 2)], AT)
