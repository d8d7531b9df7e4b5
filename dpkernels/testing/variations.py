"""What is compared: the batch as given, and variations of it that wrong rules tend to fail."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map, tree_map_only

from dpkernels.testing.truth import Batch, Loss, assert_released, fused, microbatching, rows_of

#: a bound that no gradient's norm exceeds
NO_CLIPPING = 1e12
_GEOMETRY = ("views_per_sample", "batch_first")


def is_float(leaf: Any) -> bool:
    """Whether a leaf of nested arguments or outputs is a tensor of floats."""
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch, its floats in `dtype`."""
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)


@dataclass(frozen=True)
class Case:
    """One comparison of the engine with the truth: arguments of :func:`assert_per_sample`.

    Attributes:
        label: what is special about the case.
        samples: those of the batch.
        single: whether the engine runs in float32; the truth runs in float64.
        memory_budget: as in ``make_private``.
    """

    label: str
    model: nn.Module
    loss: Loss
    batch: Batch
    samples: int
    max_grad_norm: float | None
    views_per_sample: int
    batch_first: bool
    tolerance: float
    single: bool = False
    memory_budget: int | None = None

    def first(self, samples: int) -> Case:
        """The same for the first samples of the batch."""
        rows = rows_of(self.batch, self.batch_first, 0, samples * self.views_per_sample)
        return replace(self, label=f"{samples} samples", batch=rows, samples=samples)

    def around(self, label: str, call: Callable[..., Any], *layers: nn.Module) -> Case:
        """The same with ``call(model, args, kwargs, *layers)`` as the model's forward."""
        return replace(self, label=label, model=_Around(self.model, call, *layers))

    def check(self) -> None:
        """Raise ``AssertionError`` where engine and truth differ."""
        model, batch = copy.deepcopy(self.model).double(), cast(self.batch, torch.float64)
        geometry: dict[str, Any] = {name: getattr(self, name) for name in _GEOMETRY}
        truth = microbatching(model, self.loss, batch, self.max_grad_norm, **geometry)
        geometry["memory_budget"] = self.memory_budget
        try:
            actual = fused(self.model, self.loss, self.batch, truth.max_grad_norm, **geometry)
        except Exception as error:
            raise AssertionError(f"{self.label}: the engine raised {error!r}") from error
        eps = torch.finfo(torch.float32 if self.single else torch.float64).eps
        try:
            assert_released(actual, truth, self.tolerance, 10 * eps / self.tolerance)
        except AssertionError as error:
            raise AssertionError(f"{self.label}: {error}") from None


class _Around(nn.Module):
    """Stands around a model, and answers for it."""

    def __init__(self, model: nn.Module, call: Callable[..., Any], *layers: nn.Module):
        super().__init__()
        self.model, self.call, self.layers = model, call, nn.ModuleList(layers)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.model, args, kwargs, *self.layers)


def _fewer_samples(case: Case) -> Iterator[Case]:
    odd = case.samples - 1 + case.samples % 2
    yield from (case.first(n) for n in sorted({0, 1, 2, odd}) if n < case.samples)


def _two_rows(case: Case) -> Iterator[Case]:
    """Rows of a sample are adjacent, as windows are that a network folds into the batch."""
    if case.views_per_sample == 1 and case.samples > 1:
        half = case.samples // 2
        even = case.first(2 * half)
        yield replace(even, label="two rows a sample", samples=half, views_per_sample=2)


def _reordered(case: Case) -> Iterator[Case]:
    """Inputs and outputs, and so most backprops, whose values stand in another order in memory."""

    def call(model: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda t: last_axis_first(t) if is_float(t) else t, model(*args, **kwargs))

    def last_axis_first(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1) if tensor.ndim else tensor

    batch = tuple(map(last_axis_first, case.batch))
    yield replace(case.around("not contiguous", call), batch=batch)


def _called_twice(case: Case) -> Iterator[Case]:
    """The second time with halves of the inputs; integers in reverse order beside the samples."""
    beside = int(case.batch_first)

    def other(leaf: torch.Tensor) -> torch.Tensor:
        if leaf.is_floating_point():
            return leaf * 0.5
        return leaf.flip(beside) if leaf.dtype != torch.bool and leaf.ndim > 1 else leaf

    def call(model: nn.Module, args: Any, kwargs: Any) -> Any:
        first = model(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, other, (args, kwargs))
        second = model(*args, **kwargs)
        return tree_map(lambda a, b: a + 0.5 * b if is_float(a) else a, first, second)

    yield case.around("called twice", call)


def _behind_a_layer(case: Case) -> Iterator[Case]:
    """The layer before the model is trained by the gradient at the model's inputs."""

    def call(model: nn.Module, args: Any, kwargs: Any, before: nn.Module) -> Any:
        args, kwargs = tree_map(lambda t: before(t) if floats(t) else t, (args, kwargs))
        return model(*args, **kwargs)

    def floats(leaf: Any) -> bool:
        return is_float(leaf) and leaf.ndim > 1

    before = nn.PReLU().to(next(case.model.parameters()))
    yield case.around("behind a trained layer", call, before)


def _frozen(case: Case) -> Iterator[Case]:
    """Parameters of one name (all biases, say) frozen, and all others frozen."""
    trained = {name for name, p in case.model.named_parameters() if p.requires_grad}
    choices = set()
    for kind in {name.rpartition(".")[2] for name in trained}:
        own = {name for name in trained if name.rpartition(".")[2] == kind}
        choices |= {tuple(sorted(own)), tuple(sorted(trained - own))}
    for frozen in sorted(choices - {(), tuple(sorted(trained))}):
        model = copy.deepcopy(case.model)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        yield replace(case, label=f"{', '.join(frozen)} frozen", model=model)


def _single_precision(case: Case) -> Iterator[Case]:
    """Not clipped: clip factors leave a margin for rounding, which float32 shows."""
    model, batch = copy.deepcopy(case.model).float(), cast(case.batch, torch.float32)
    single = replace(case, label="float32", model=model, batch=batch, single=True)
    yield replace(single, max_grad_norm=NO_CLIPPING, tolerance=3e-4)


#: what :func:`assert_per_sample` tries beside the batch as given
VARIATIONS: dict[str, Callable[[Case], Iterator[Case]]] = {
    "fewer samples": _fewer_samples,
    "two rows a sample": _two_rows,
    "order in memory": _reordered,
    "called twice": _called_twice,
    "behind a layer": _behind_a_layer,
    "frozen parameters": _frozen,
    "no memory": lambda case: iter([replace(case, label="memory_budget=0", memory_budget=0)]),
    "float32": _single_precision,
}
