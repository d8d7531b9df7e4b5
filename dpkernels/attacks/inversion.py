"""Gradient matching: an honest but curious server seeks data with the received gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from dpkernels.attacks.gradient import LossOfOutput, Server


def gradient_matching(
    images: torch.Tensor,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    model: nn.Module,
    loss: LossOfOutput,
    updates: int = 1,
    iterations: int = 300,
    learning_rate: float = 0.1,
    total_variation: float = 1e-2,
    seed: int = 0,
    noise_generator: torch.Generator | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Reconstruct a batch from the user's own, unchanged model [Geiping et al. 2020].

    The candidates start from noise. Each iteration turns the candidates' gradient towards the
    released gradient: Adam moves the candidates by the sign of the descent direction of one minus
    the cosine, plus total variation. The learning rate falls to a tenth in steps. The labels are
    known.

    Args:
        images: [B, ...], the records of one batch, in [0, 1]; few of them.
        noise_multiplier: std of the noise divided by max_grad_norm, >= 0.
        max_grad_norm: bound C on one record's gradient, > 0.
        model: the user's model, which is copied; twice differentiable.
        loss: the loss of the model's output, a mean over samples.
        updates: private steps on these records; their gradients are averaged.
        iterations: steps of the search.
        learning_rate: learning rate of the search.
        total_variation: weight of the prior that pictures are smooth.
        seed: seed of the candidates' starting point.
        noise_generator: replaces the engine's generator, for tests.
        on_progress: called after each iteration.

    Returns:
        Candidates [B, ...], in [0, 1].
    """
    plain = copy.deepcopy(model).to(images.device).train()
    private = copy.deepcopy(plain)
    server = Server(
        private,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        batch_size=len(images),
        noise_generator=noise_generator,
    )
    seen = server.released(
        images.float(), loss, [p for p in private.parameters() if p.requires_grad], updates
    )
    parameters = [p for p in plain.parameters() if p.requires_grad]
    target_norm = torch.stack([g.square().sum() for g in seen]).sum().sqrt()
    start = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    guess = start.to(images.device).requires_grad_(True)
    optimizer = torch.optim.Adam([guess], lr=learning_rate)
    milestones = [int(iterations * share) for share in (0.4, 0.65, 0.85)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.464)
    for _ in range(iterations):
        gradients = torch.autograd.grad(loss(plain(guess)), parameters, create_graph=True)
        dot = torch.stack([(a * b).sum() for a, b in zip(gradients, seen, strict=True)]).sum()
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        cost = 1 - dot / (norm * target_norm).clamp_min(1e-30)
        cost = cost + total_variation * _total_variation(guess)
        (direction,) = torch.autograd.grad(cost, guess)
        guess.grad = direction.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            guess.clamp_(0.0, 1.0)
        on_progress()
    return guess.detach()


def _total_variation(images: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbours, summed over the axes of [B, C, ...]."""
    axes = range(2, images.ndim)
    return torch.stack([images.diff(dim=axis).abs().mean() for axis in axes]).sum()
