"""Modules that have no per-sample gradient: the reason names the remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn
from torch.nn.utils import parametrizations

from dpkernels.layers import refusal
from dpkernels.layers.refusals import refusal_without_rule

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: nn.BatchNorm2d(2), "use nn.GroupNorm"),
    "synchronised batch norm": (lambda: nn.SyncBatchNorm(2), "use nn.GroupNorm"),
    "batch norm without statistics": (
        lambda: nn.BatchNorm1d(2, track_running_stats=False).eval(), "use nn.GroupNorm",
    ),
    "instance norm with statistics": (
        lambda: nn.InstanceNorm1d(2, track_running_stats=True), "use track_running_stats=False",
    ),
    "former weight norm": (lambda: nn.utils.weight_norm(nn.Linear(2, 2)), "parametrizations"),
    "former spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(2, 2)), "power iteration"),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(2, 2)).parametrizations.weight[0],
        "power iteration",
    ),
    "embedding": (lambda: nn.Embedding(3, 2, max_norm=1.0), "use max_norm=None"),
    "bag": (lambda: nn.EmbeddingBag(3, 2, scale_grad_by_freq=True), "use scale_grad_by_freq=False"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_names_the_remedy(name: str) -> None:
    build, remedy = REFUSED[name]
    assert remedy in (refusal(build()) or "")


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.BatchNorm2d(2).eval(),
        lambda: nn.InstanceNorm1d(2, affine=True),
        lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
        lambda: nn.Embedding(3, 2),
        nn.Flatten,
    ],
)
def test_what_has_per_sample_gradients_is_not_refused(build: Callable[[], nn.Module]) -> None:
    assert refusal(build()) is None


def test_a_subclass_of_batch_norm_is_refused_too_while_it_trains() -> None:
    class Own(nn.BatchNorm2d):
        pass

    assert "use nn.GroupNorm" in (refusal_without_rule(Own(2)) or "")
    assert refusal_without_rule(Own(2).eval()) is None
    assert refusal_without_rule(nn.GroupNorm(1, 2)) is None
