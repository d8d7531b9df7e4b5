"""What one sample contributes has a norm of at most C, in spite of rounding: ten thousand of them.

Noise is off, so that a sample's contribution is what is released where it is alone, or where the
loss gives all others no gradient. The second way takes the strategies that store nothing.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tests.engine.device.models import NETWORKS, network_of
from tests.engine.device.support import Private, autocast, private

#: samples of each of the 32 combinations: 10,240 on a GPU
SAMPLES = {"cpu": 12, "cuda": 320}
BOUNDS = (1.0, 0.37, 1e-3)
#: samples of a batch in which only one has a gradient; a power of two, so the mean rounds nothing
OTHERS = 16

#: by name: the dtype of autocast, and whether backward() is called inside of it
PRECISIONS: dict[str, tuple[torch.dtype | None, bool]] = {
    "float32": (None, False),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16-inside": (torch.bfloat16, True),
    "float16": (torch.float16, False),
}


def contribution(
    made: Private, x: torch.Tensor, sample: int, dtype: torch.dtype | None, inside: bool
) -> torch.Tensor:
    """Norm of what `sample` adds to the sum, in float64, when the others have no gradient."""
    made.optimizer.zero_grad()
    with autocast(x.device, dtype):
        output = made.wrapped(x)
    losses = (output.float() - 0.3).square().flatten(1).sum(1)
    chosen = torch.zeros_like(losses)
    chosen[sample] = 1.0
    loss = (losses * chosen).mean()
    with autocast(x.device, dtype if inside else None):
        loss.backward()
    return made.contribution() * made.optimizer.expected_batch_size


def largest_share(
    made: Private,
    batches: list[torch.Tensor],
    samples: int,
    dtype: torch.dtype | None = None,
    inside: bool = False,
) -> tuple[float, float]:
    """Of `samples` contributions: the largest over C, and the share that was clipped."""
    shares, clipped = [], []
    for i, bound in zip(range(samples), itertools.cycle(BOUNDS)):
        made.optimizer.max_grad_norm = bound
        x = batches[i % len(batches)]
        sample = i % len(x)
        shares.append(contribution(made, x, sample, dtype, inside) / bound)
        clipped.append(made.optimizer.last_step.clip_factor[sample] < 1)
    return float(torch.stack(shares).max()), float(torch.stack(clipped).float().mean())


@pytest.mark.parametrize("count", [1, OTHERS])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_contribution_exceeds_the_bound(
    name: str, precision: str, count: int, device: torch.device
) -> None:
    dtype, inside = PRECISIONS[precision]
    samples = SAMPLES[device.type]
    model, x = network_of(name, samples if count == 1 else 4 * count, device)
    made = private(model, x[:count], device, 1.0, memory_budget=0)
    share, clipped = largest_share(made, list(x.split(count)), samples, dtype, inside)
    assert clipped > 0.5, "the bound must bind"
    assert 0.97 < share <= 1.0, f"{share - 1:.3g} above C"


class Cancelling(nn.Module):
    """One row at several positions whose gradients nearly add up to zero."""

    def __init__(self, positions: int = 6, features: int = 96) -> None:
        super().__init__()
        self.layer = nn.Linear(40, features, bias=False)
        sign = torch.ones(positions, 1).index_fill(0, torch.arange(0, positions, 2), -1.0)
        self.register_buffer("sign", sign * (1 + 1e-4 * torch.randn(positions, features)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x.unsqueeze(1).expand(-1, len(self.sign), -1)) * self.sign).sum(1)


def test_gradients_that_cancel(device: torch.device, full_float32: None) -> None:
    """Their norm by Gram products is little more than rounding, and so is what is summed."""
    torch.manual_seed(0)
    model, x = Cancelling(), NETWORKS["rows"][1](64, torch.Generator(device).manual_seed(1))
    made = private(model, x[:OTHERS], device, 1.0, memory_budget=0)
    share, _ = largest_share(made, list(x.split(OTHERS)), SAMPLES[device.type])
    assert made.strategies() == {"gram"}
    assert 0.0 < share <= 1.0, f"{share - 1:.3g} above C"
