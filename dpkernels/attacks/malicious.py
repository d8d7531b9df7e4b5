"""A malicious layer in front of the user's model, in which each row fires for few records."""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import nn

from dpkernels.accounting.checks import check_count
from dpkernels.attacks.gradient import LossOfOutput, Server

_GAIN = 1e-8
_AMPLIFICATION = 1e6
_TRAP_SCALE = 0.999
_LEAST_SPREAD = 1e-3


class MaliciousLayer(nn.Module):
    """``x -> x + pattern * a * sum of relu(linear(x))``, a = `_AMPLIFICATION`.

    The linear layer has weight and bias times `_GAIN`, so the added term has the factor
    `_GAIN * _AMPLIFICATION`, and the model behind works almost as before. The linear layer's
    gradient has the factor `_AMPLIFICATION` alone, so a record's gradient in the linear layer
    outweighs the record's gradient in the rest of the model, and the clipping bound is spent on
    the record.

    Args:
        weight: [R, D], the linear layer's weight before `_GAIN`.
        bias: [R], the linear layer's bias before `_GAIN`.
        seed: seed of the pattern, which is +1 or -1 for each value of x.
    """

    pattern: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, seed: int = 0) -> None:
        super().__init__()
        rows, size = weight.shape
        self.linear = nn.Linear(size, rows, device=weight.device)
        with torch.no_grad():
            self.linear.weight.copy_(weight * _GAIN)
            self.linear.bias.copy_(bias * _GAIN)
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0
        self.register_buffer("pattern", signs.to(weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, ...] to [B, ...]."""
        flat = x.flatten(1)
        added = torch.relu(self.linear(flat)).sum(dim=1, keepdim=True) * _AMPLIFICATION
        return (flat + added * self.pattern).reshape(x.shape)


def imprint(
    images: torch.Tensor,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    model: nn.Module | None = None,
    loss: LossOfOutput | None = None,
    bins: int = 128,
    known_means: tuple[float, float] | None = None,
    updates: int = 1,
    noise_generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Sort the records of a batch into bins of a linear layer [Fowl et al. 2022].

    All rows measure the mean of a record, with thresholds at the quantiles of a normal law that an
    attacker knows from public data of the same kind. A row fires for every record above the row's
    threshold, so the difference of neighbouring rows' gradients belongs to the records between two
    thresholds. Where only one record lies between two thresholds, the difference of the weight's
    gradients divided by the difference of the bias's gradients is that record.

    Args:
        images: [B, ...], the records of one batch.
        noise_multiplier: std of the noise divided by max_grad_norm, >= 0.
        max_grad_norm: bound C on one record's gradient, > 0.
        model: the user's model, of which a copy runs behind the layer; None: nothing runs there.
        loss: the loss of the model's output, a mean over samples; needed with `model`.
        bins: rows of the layer.
        known_means: mean and standard deviation of the normal law; None: those of `images`' means.
        updates: private steps on these records; their gradients are averaged.
        noise_generator: replaces the engine's generator, for tests.

    Returns:
        Candidates [bins, ...]; zero where a bin shows nothing.

    Raises:
        ValueError: an argument is out of range, or `loss` is missing.
    """
    check_count("bins", bins)
    flat = images.flatten(1).float()
    means = flat.mean(dim=1)
    centre, spread = known_means or (float(means.mean()), float(means.std(correction=0)))
    law = NormalDist(centre, max(spread, _LEAST_SPREAD))
    edges = torch.tensor([law.inv_cdf((i + 0.5) / bins) for i in range(bins)])
    weight = torch.full((bins, flat.shape[1]), 1.0 / flat.shape[1], device=images.device)
    layer = MaliciousLayer(weight, -edges.to(images.device))
    grad_weight, grad_bias = _attack(
        layer, images, model, loss, noise_multiplier, max_grad_norm, updates, noise_generator
    )
    grad_weight[:-1] -= grad_weight[1:].clone()
    grad_bias[:-1] -= grad_bias[1:].clone()
    return _quotients(grad_weight, grad_bias).reshape(bins, *images.shape[1:])


def trap_weights(
    images: torch.Tensor,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    model: nn.Module | None = None,
    loss: LossOfOutput | None = None,
    bins: int | None = None,
    updates: int = 1,
    seed: int = 0,
    noise_generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Rows with random weights that hardly fire [Boenisch et al. 2023, "trap weights"].

    Half of each row's weights, at random, is negative, the other half the same values times
    -0.999: for data in [0, 1] a row stays just below zero for most records. Where a row fires for
    one record only, the row's weight gradient divided by its bias gradient is that record.

    Args:
        images: [B, ...], the records of one batch, in [0, 1].
        bins: rows of the layer; default twice the batch.
        seed: seed of the weights.
        noise_multiplier, max_grad_norm, model, loss, updates, noise_generator: as in `imprint`.

    Returns:
        Candidates [bins, ...]; zero where a row shows nothing.

    Raises:
        ValueError: as in `imprint`.
    """
    rows = check_count("bins", 2 * len(images) if bins is None else bins)
    size = images[0].numel()
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(rows, size)
    for row in weight:
        order = torch.randperm(size, generator=generator)
        half = size // 2
        values = torch.randn(size - half, generator=generator).abs()
        row[order[half:]] = -values
        row[order[:half]] = _TRAP_SCALE * values[:half]
    layer = MaliciousLayer(weight.to(images.device) / size, torch.zeros(rows, device=images.device))
    grad_weight, grad_bias = _attack(
        layer, images, model, loss, noise_multiplier, max_grad_norm, updates, noise_generator
    )
    return _quotients(grad_weight, grad_bias).reshape(rows, *images.shape[1:])


def _attack(
    layer: MaliciousLayer,
    images: torch.Tensor,
    model: nn.Module | None,
    loss: LossOfOutput | None,
    noise_multiplier: float,
    max_grad_norm: float,
    updates: int,
    noise_generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Released gradients of the layer's weight [R, D] and bias [R]."""
    if model is not None and loss is None:
        raise ValueError("loss=None: expected the loss of the model's output beside a model")
    behind: nn.Module = nn.Flatten() if model is None else copy.deepcopy(model).to(images.device)
    pattern = layer.pattern
    of_output: Callable[[torch.Tensor], torch.Tensor] = loss or (
        lambda output: (output * pattern).mean(dim=1).mean()
    )
    server = Server(
        nn.Sequential(layer, behind),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        batch_size=len(images),
        noise_generator=noise_generator,
    )
    weight, bias = server.released(
        images.float(), of_output, [layer.linear.weight, layer.linear.bias], updates
    )
    return weight, bias


def _quotients(grad_weight: torch.Tensor, grad_bias: torch.Tensor) -> torch.Tensor:
    """[R, D]: weight gradients of the rows over bias gradients; zero where the latter are zero."""
    seen = grad_bias != 0
    divisor = torch.where(seen, grad_bias, torch.ones_like(grad_bias))
    return torch.where(seen[:, None], grad_weight / divisor[:, None], 0.0)
