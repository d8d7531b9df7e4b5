"""When a model is tried, by schedule, and what has passed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpkernels.engine.capture.refusals import NotPerSample, Untried
from dpkernels.engine.capture.trial_book import BATCHED, SCALAR, TrialBook, output_kind
from tests.engine.hard_cases.refusals import normal, refusal

DOUBLING = [1, 2, 4, 8, 16]
SCHEDULES = {"doubling": DOUBLING, "first": [1], "every": [*range(1, 21)], "off": []}


def tried(book: TrialBook, sizes: list[int], told: bool = True) -> list[int]:
    """Numbers of the batches, from 1, that are tried."""
    found = []
    for number, samples in enumerate(sizes, 1):
        book.trial = lambda number=number: found.append(number) or told
        if book.due(samples):
            book.run(samples)
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str) -> None:
    book = TrialBook(schedule)
    assert tried(book, [8] * 20) == SCHEDULES[schedule]
    assert book.turn == len(SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", ["doubling", "first", "every"])
def test_a_batch_of_one_sample_is_no_batch_of_the_schedule(schedule: str) -> None:
    found = tried(TrialBook(schedule), [1, 0, 1, *[8] * 17])
    assert found == [n + 3 for n in SCHEDULES[schedule] if n <= 17]


def test_three_samples_are_tried_after_two_whatever_the_schedule() -> None:
    assert tried(TrialBook("first"), [2, 2, 3, 8, 8]) == [1, 3]
    assert tried(TrialBook("off"), [2, 2, 3]) == []


def test_a_trial_that_cannot_tell_is_made_up_for_at_the_next_batch() -> None:
    book = TrialBook("first")
    assert tried(book, [8] * 3, told=False) == [1, 2, 3]
    assert book.untold
    assert (book.turn, book.largest) == (0, 0)
    assert tried(book, [8] * 3) == [1]
    assert not book.untold
    assert (book.turn, book.largest) == (1, 8)


def test_a_refused_batch_has_passed_nothing() -> None:
    book = TrialBook("first")

    def refuse() -> bool:
        book.check("layer", 4, 3)
        raise NotPerSample("mixed")

    book.trial = refuse
    for _ in range(2):
        assert book.due(8)
        with pytest.raises(NotPerSample):
            book.run(8)
        assert book.passed is None


def test_rows_that_no_trial_met_are_tried() -> None:
    book = TrialBook("first")
    book.trial = lambda: book.check("layer", 1, 2) or True
    book.run(8)
    book.check("layer", 1, 2)
    book.check("another", 1, 2)
    for rows in ((4, 2), (1, 3)):
        with pytest.raises(Untried, match="'layer'"):
            book.check("layer", *rows)
    with pytest.raises(Untried, match="'another': it has 2 rows"):
        book.check("another", 2, 2)
    book.trial = lambda: book.check("layer", 4, 2) or True
    book.run(8)
    book.check("layer", 4, 2)
    book.check("layer", 1, 2)


def test_a_model_without_a_trial_checks_nothing() -> None:
    book = TrialBook()
    book.run(8)
    book.check("layer", 4, 2)
    assert (book.turn, book.passed) == (0, None)


def test_losses_and_rows_are_told_apart() -> None:
    assert output_kind(torch.zeros(()), 0) == SCALAR
    assert output_kind(torch.zeros(1), 0) == SCALAR
    assert output_kind(torch.zeros(8), 0) == BATCHED
    assert output_kind(torch.zeros(8), 1) == SCALAR
    assert output_kind(torch.zeros(4, 8), 1) == BATCHED


class Counting(nn.Module):
    """Counts forward passes where no trial puts the number back."""

    def __init__(self, calls: list[int]) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.count = lambda: calls.append(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count()
        return self.layer(x)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_makes_the_passes_of_the_schedule(schedule: str) -> None:
    """A first trial takes five passes, a later one two, besides the step's own."""
    calls: list[int] = []
    passes: list[int] = []

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        calls.clear()
        output = model(*batch)
        passes.append(len(calls))
        return output.square().sum(1).mean()

    batches = [(normal(8, 5, seed=seed),) for seed in range(9)]
    assert refusal(Counting(calls), batches, loss, trial=schedule) is None
    trials = SCHEDULES[schedule]
    expected = [1 + (n in trials) * (5 if n == 1 else 2) for n in range(1, 10)]
    assert passes == expected
