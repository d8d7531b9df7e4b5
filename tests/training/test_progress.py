"""What is shown while a run is on, and how often epsilon is computed for it."""

import pytest
from rich.console import Console

from dpkernels.training import progress
from dpkernels.training.privacy import PrivacyPlan, StepStatistics
from dpkernels.training.progress import ConsoleDisplay, Display

PLAN = PrivacyPlan(True, 10, 0.5, 6, 1.0, 1.0, 1, 1e-5, "tight")


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    standing = Clock()
    monkeypatch.setattr(progress, "time", standing)
    return standing


@pytest.fixture
def slow(clock, monkeypatch):
    """Every epsilon takes two seconds to compute; the exact one."""
    exact = PrivacyPlan.epsilon

    def compute(plan, steps):
        clock.now += 2.0
        return exact(plan, steps)

    monkeypatch.setattr(PrivacyPlan, "epsilon", compute)
    return exact


def test_epsilon_takes_a_twentieth_of_the_time_at_most(clock, slow):
    with Display().training(PLAN, done=0) as bar:
        assert bar.advance(StepStatistics(2)) == slow(PLAN, 1)
        clock.now += 39.0
        assert bar.advance(StepStatistics(2)) is None
        clock.now += 2.0
        assert bar.advance(StepStatistics(2)) == slow(PLAN, 3)


def test_the_epsilon_of_the_last_step_is_always_computed(slow):
    with Display().training(PLAN, done=3) as bar:
        found = [bar.advance(StepStatistics(2)) for _ in range(3)]
    assert found == [slow(PLAN, 4), None, slow(PLAN, 6)]


def test_without_privacy_there_is_no_epsilon():
    plain = PrivacyPlan(False, 10, 0.5, 6, 0.0, 1.0, 1, 1e-5, "tight")
    with Display().training(plain, done=5) as bar:
        assert bar.advance(StepStatistics(2)) is None


@pytest.fixture
def piped(capsys):
    """A console that is no terminal, and what was printed to it."""
    return ConsoleDisplay(Console(width=200)), lambda: capsys.readouterr().out


def test_without_a_terminal_there_is_a_line_every_ten_seconds_and_at_the_end(piped, clock):
    display, printed = piped
    with display.training(PLAN, done=2) as bar:
        for seconds, loss in ((4.0, 1.0), (7.0, 2.0), (1.0, None), (1.0, 1.0)):
            clock.now += seconds
            bar.advance(StepStatistics(3, loss, clipped_fraction=0.5))
    lines = [line for line in printed().splitlines() if line]
    assert [line.split()[1] for line in lines] == ["4/6", "6/6"]
    assert "loss 1.100" in lines[0], "nine tenths of what was, one of what is"
    assert "clipped 50%" in lines[0]
    assert "11 s left" in lines[0], "two steps took eleven seconds, two are left"
    assert f"epsilon {PLAN.epsilon(6):.3g}" in lines[1]
    assert "loss 1.090" in lines[1], "a step without patients leaves the loss as it was"


def test_counting_ends_in_one_line(piped):
    display, printed = piped
    with display.counting("Reading", 3) as advance:
        for _ in range(3):
            advance()
    assert printed() == "Reading: 3 done\n"


def test_a_silent_display_shows_nothing_and_counts_all_the_same(capsys):
    display = Display()
    with display.counting("Reading", 3) as advance:
        advance()
    with display.training(PLAN, done=5) as bar:
        assert bar.advance(StepStatistics(2)) == PLAN.epsilon(6)
    assert capsys.readouterr().out == ""
