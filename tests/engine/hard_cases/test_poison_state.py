"""State that one step leaves to the next: refused by the attribute's name, wherever it is kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dpkernels.engine.trial.findings import Kind
from tests.engine.hard_cases.refusals import assert_refused, normal, refusal
from tests.engine.support import squared_loss, values
from tests.engine.truth import assert_private


class Keeping(nn.Module):
    """``second(h - kept)``; then the batch's mean, or a constant, enters what is kept.

    Args:
        start: what the attribute ``kept`` is at first.
        read: what the model takes from it.
        write: keeps the mean of a batch, [5], in it.
        private: whether the mean is the batch's; else the weights'.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        read: Callable[[Any], Any],
        write: Callable[[nn.Module, torch.Tensor], None],
        private: bool = True,
    ) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)
        self.kept, self.read, self.write, self.private = start(), read, write, private

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        read = self.read(self.kept)
        output = self.second(h - read.to(h) if isinstance(read, torch.Tensor) else h - read)
        self.write(self, (h if self.private else self.first.weight).detach().mean(0))
        return output


def average(old: Any, new: Any) -> Any:
    return 0.9 * old + 0.1 * new


def replace(model: Any, mean: torch.Tensor) -> None:
    model.kept = average(model.kept, mean)


def in_place(model: Any, mean: torch.Tensor) -> None:
    model.kept.mul_(0.9).add_(mean, alpha=0.1)


def through_data(model: Any, mean: torch.Tensor) -> None:
    model.kept.data.mul_(0.9).add_(mean, alpha=0.1)


def in_object(model: Any, mean: torch.Tensor) -> None:
    model.kept.mean = average(model.kept.mean, mean)


def to_number(model: Any, mean: torch.Tensor) -> None:
    model.kept = average(model.kept, float(mean.mean()))


def in_array(model: Any, mean: torch.Tensor) -> None:
    model.kept[:] = average(model.kept, mean.double().numpy())


def first_batch(model: Any, mean: torch.Tensor) -> None:
    """As an ActNorm starts."""
    model.kept = mean if model.kept is None else model.kept


def put(key: Any) -> Callable[[Any, torch.Tensor], None]:
    def write(model: Any, mean: torch.Tensor) -> None:
        model.kept[key] = average(model.kept[key], mean)

    return write


Keeper = tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any, torch.Tensor], None], str]

KEEPERS: dict[str, Keeper] = {
    "attribute": (lambda: torch.zeros(5), lambda kept: kept, replace, "kept"),
    "in_place": (lambda: torch.zeros(5), lambda kept: kept, in_place, "kept"),
    "data": (lambda: torch.zeros(5), lambda kept: kept.clone(), through_data, "kept"),
    "list": (lambda: [torch.zeros(5)], lambda kept: kept[0], put(0), "kept[0]"),
    "dict": (lambda: {"a": torch.zeros(5)}, lambda kept: kept["a"], put("a"), "kept.a"),
    "nested": (
        lambda: {"a": [{"b": torch.zeros(5)}]}, lambda kept: kept["a"][0]["b"],
        lambda model, mean: model.kept["a"][0].update(b=mean), "kept.a[0].b",
    ),
    "growing": (
        list, lambda kept: sum(kept), lambda model, mean: model.kept.append(mean), "kept[0]",
    ),
    "deque": (
        lambda: deque([torch.zeros(5)], 2), lambda kept: sum(kept),
        lambda model, mean: model.kept.append(mean), "kept[1]",
    ),
    "object": (lambda: SimpleNamespace(mean=torch.zeros(5)), lambda k: k.mean, in_object,
               "kept.mean"),
    "empty_object": (
        lambda: SimpleNamespace(), lambda k: getattr(k, "mean", 0.0),
        lambda model, mean: setattr(model.kept, "mean", mean), "kept.mean",
    ),
    "number_in_object": (
        lambda: SimpleNamespace(mean=0.0), lambda k: k.mean,
        lambda model, mean: setattr(model.kept, "mean", float(mean.mean())), "kept.mean",
    ),
    "float": (lambda: 0.0, lambda kept: kept, to_number, "kept"),
    "numpy": (lambda: np.zeros(5), lambda kept: torch.from_numpy(kept.copy()), in_array, "kept"),
    "first_batch": (lambda: None, lambda kept: 0.0 if kept is None else kept, first_batch, "kept"),
    "set": (
        lambda: set(), lambda kept: sum(kept, 0.0),
        lambda model, mean: model.kept.add(float(mean.mean())), "kept",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEEPERS)
def test_state_is_refused_and_left_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    start, read, write, where = KEEPERS[name]
    model = Keeping(start, read, write)
    held = model.kept
    message = refusal(model, [(normal(7, 5),)])
    assert_refused(message, f"attribute '{where}'", Kind.STATE)
    assert model.kept is held
    assert str(model.kept) == str(start())


@pytest.mark.parametrize("samples", [3, 2000])
def test_state_of_few_and_many_samples_is_refused(samples: int) -> None:
    torch.manual_seed(0)
    start, read, write, where = KEEPERS["in_place"]
    message = refusal(Keeping(start, read, write), [(normal(samples, 5),)])
    assert_refused(message, f"attribute '{where}'", Kind.STATE)


@pytest.mark.parametrize("name", KEEPERS)
def test_state_of_public_things_is_private(name: str) -> None:
    """What is kept of the weights is what the released steps make of it."""
    torch.manual_seed(0)
    start, read, write, _ = KEEPERS[name]
    batches = [(normal(7, 5, seed=seed),) for seed in range(4)]
    assert refusal(Keeping(start, read, write, private=False), batches, trial="every") is None


class Recurrent(nn.Module):
    """A recurrent layer whose hidden state goes on with the next batch, or starts afresh."""

    def __init__(self, carried: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)
        self.carried, self.hidden = carried, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden if self.carried else None
        output, hidden = self.layer(x, hidden)
        self.hidden = hidden.detach()
        return self.head(output[:, -1])


def test_a_hidden_state_carried_on_is_refused_and_started_afresh_is_private() -> None:
    torch.manual_seed(0)
    message = refusal(Recurrent(True), [(normal(7, 4, 5),)])
    assert_refused(message, "attribute 'hidden'", Kind.STATE)
    assert refusal(Recurrent(False), [(normal(7, 4, 5),)]) is None
    assert_private(Recurrent(False).double(), squared_loss, (values(6, 4, 5),))


GLOBAL: dict[str, torch.Tensor] = {}


class Outside(nn.Module):
    """Keeps the batch's mean where no attribute of the model leads."""

    def __init__(self, keep: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.keep = nn.Linear(5, 5), nn.Linear(5, 3), keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.second(h - self.keep(h.detach().mean(0)))


def captured_list() -> Callable[[torch.Tensor], Any]:
    kept: list[torch.Tensor] = []

    def keep(mean: torch.Tensor) -> Any:
        kept.append(mean)
        return kept[-2] if len(kept) > 1 else 0.0

    return keep


def captured_name() -> Callable[[torch.Tensor], Any]:
    kept: Any = 0.0

    def keep(mean: torch.Tensor) -> Any:
        nonlocal kept
        old, kept = kept, mean
        return old

    return keep


def named_globally() -> Callable[[torch.Tensor], Any]:
    GLOBAL.clear()

    def keep(mean: torch.Tensor) -> Any:
        old = GLOBAL.get("kept", 0.0)
        GLOBAL["kept"] = mean
        return old

    return keep


@pytest.mark.parametrize("keep", [captured_list, captured_name, named_globally])
@pytest.mark.parametrize("samples", [3, 64])
def test_state_outside_the_model_is_refused(keep: Callable[[], Any], samples: int) -> None:
    """The pass before leaves it, so that two equal passes differ."""
    torch.manual_seed(0)
    message = refusal(Outside(keep()), [(normal(samples, 5),)])
    assert_refused(message, "layer 'second': the activations", Kind.UNREPEATABLE)


class Drawing(nn.Module):
    """Draws noise from a generator of its own, where the trial finds it or does not."""

    def __init__(self, known: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)
        generator = torch.Generator().manual_seed(0)
        self.generator = generator if known else None
        self.draw = lambda shape: torch.randn(shape, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.second(h + self.draw(h.shape))


def test_a_hidden_generator_is_refused_and_one_in_an_attribute_is_private() -> None:
    torch.manual_seed(0)
    batches = [(normal(7, 5, seed=seed),) for seed in range(4)]
    message = refusal(Drawing(known=False), batches)
    assert_refused(message, "layer 'second': the activations", Kind.UNREPEATABLE)
    assert refusal(Drawing(known=True), batches, trial="every") is None


class ReadLater(nn.Module):
    """Keeps the batch's mean from the beginning, and reads it from the third batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)
        self.kept, self.step = torch.zeros(5), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, self.step = self.first(x), self.step + 1
        output = self.second(h - self.kept if self.step > 3 else h)
        self.kept = h.detach().mean(0)
        return output


def test_state_read_from_a_later_batch_on_is_refused_at_a_later_trial() -> None:
    torch.manual_seed(0)
    batches = [(normal(7, 5, seed=seed),) for seed in range(8)]
    assert refusal(ReadLater(), batches[:2]) is None
    message = refusal(ReadLater(), batches)
    assert_refused(message, "attribute 'kept'", Kind.STATE)


class Looking(nn.Module):
    """Keeps attention maps for a picture; nothing reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.maps, self.seen = nn.Linear(5, 3), None, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.layer(x)
        self.maps = output.detach().softmax(1)
        self.seen.append(float(output.detach().mean()))
        return output


def test_what_is_kept_and_never_read_is_private() -> None:
    torch.manual_seed(0)
    batches = [(normal(7, 5, seed=seed),) for seed in range(4)]
    model = Looking()
    assert refusal(model, batches, trial="every") is None
    assert len(model.seen) == 4
    assert_private(Looking().double(), squared_loss, (values(6, 5),))
