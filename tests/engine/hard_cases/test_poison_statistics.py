"""Statistics over the batch, and other samples' values, in a forward pass: refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpkernels.engine.trial.findings import Kind
from tests.engine.hard_cases.refusals import Around, assert_refused, normal, refusal
from tests.engine.support import squared_loss, values
from tests.engine.truth import assert_private

Program = Callable[[torch.Tensor], torch.Tensor]


def quarters_centred(h: torch.Tensor) -> torch.Tensor:
    parts = h.unflatten(0, (4, -1)) if len(h) % 4 == 0 else h[None]
    return (parts - parts.mean(1, keepdim=True)).flatten(0, 1)


def shuffled_mix(h: torch.Tensor) -> torch.Tensor:
    return 0.7 * h + 0.3 * h[torch.randperm(len(h))]


def nearest_other(h: torch.Tensor) -> torch.Tensor:
    distances = torch.cdist(h, h).fill_diagonal_(torch.inf)
    return h + h[distances.argmin(1)]


def three_nearest(h: torch.Tensor) -> torch.Tensor:
    near = torch.cdist(h, h).topk(min(3, len(h)), largest=False).indices
    return h + h[near].mean(1)


def most_extreme(h: torch.Tensor) -> torch.Tensor:
    return torch.cat([h[:, :2], h[h.norm(dim=1).argmax()].expand(len(h), -1)[:, 2:]], 1)


def contrast(h: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(h)
    return h * (unit @ unit.T).logsumexp(1, keepdim=True)


def attention_over_samples(h: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(h[None], h[None], h[None])[0]


def routed_by_capacity(h: torch.Tensor) -> torch.Tensor:
    """An expert takes the half of the batch that scores highest."""
    taken = torch.zeros(len(h), 1)
    taken[h[:, 0].topk(max(1, len(h) // 2)).indices] = 1.0
    return h * (1 + taken)


STATISTICS: dict[str, Program] = {
    "max": lambda h: h / h.abs().max(),
    "max_of_axis": lambda h: h / h.abs().amax(0),
    "mean": lambda h: h - h.mean(0),
    "std": lambda h: h / h.std(0),
    "median": lambda h: h - h.median(0).values,
    "quantile": lambda h: h - h.quantile(0.9, dim=0),
    "sum": lambda h: h / h.square().sum().sqrt(),
    "detached_mean": lambda h: h - h.detach().mean(0),
    "batch_norm": lambda h: F.batch_norm(h, None, None, training=True),
    "softmax": lambda h: h.softmax(0) * len(h),
    "sort": lambda h: h.sort(0).values,
    "cumsum": lambda h: h.cumsum(0),
    "cummax": lambda h: h.cummax(0).values,
    "roll": lambda h: h.roll(1, 0),
    "flip": lambda h: h.flip(0),
    "quarters": quarters_centred,
    "mixup": shuffled_mix,
    "nearest": nearest_other,
    "three_nearest": three_nearest,
    "most_extreme": most_extreme,
    "contrast": contrast,
    "attention": attention_over_samples,
    "capacity": routed_by_capacity,
    "first_as_context": lambda h: h + h[:1],
    "difference": lambda h: torch.cat([h[:1], h[1:] - h[:-1]]),
    "interpolated": lambda h: F.interpolate(h.T[None], len(h) - 1)[0].T[[*range(len(h) - 1), -1]],
    "convolved": lambda h: F.avg_pool1d(h.T[None], 3, 1, 1)[0].T,
    "count": lambda h: h * (h[:, :1] > 0).sum(),
    "any": lambda h: h * (1 + (h > 100.0).any(0)),
    "rank": lambda h: h + h[:, :1].argsort(0).argsort(0) / len(h),
    "gram": lambda h: h @ (h.T @ h),
    "fft": lambda h: torch.fft.fft(h, dim=0).real / len(h),
}


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("samples", [3, 7, 64])
def test_statistics_are_refused(name: str, samples: int) -> None:
    torch.manual_seed(0)
    batches = [(normal(samples, 5, seed=seed),) for seed in range(4)]
    message = refusal(Around(STATISTICS[name]), batches, trial="every")
    assert_refused(message, "layer 'second': the activations of sample", Kind.STATISTICS)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_of_a_large_batch_are_refused(name: str) -> None:
    torch.manual_seed(0)
    message = refusal(Around(STATISTICS[name]), [(normal(2000, 5),)])
    assert_refused(message, "layer 'second': the activations of sample", Kind.STATISTICS)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_behind_the_last_layer_are_refused(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 5)
    model.register_forward_hook(lambda module, given, output: STATISTICS[name](output))
    batches = [(normal(7, 5, seed=seed),) for seed in range(4)]
    message = refusal(model, batches, trial="every")
    assert_refused(message, "model: the values of output 0 of sample", Kind.STATISTICS)
