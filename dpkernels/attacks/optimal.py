"""The optimal attacker without prior knowledge [Schwethelm et al., arXiv 2402.12861]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from dpkernels.attacks.gradient import Server


def linear_optimal(
    images: torch.Tensor,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    updates: int = 1,
    noise_generator: torch.Generator | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Reconstruct each record by itself, as well as possible without prior knowledge.

    The model is ``Linear(D -> M)`` without bias, the loss the sum of its outputs: every row of a
    record's gradient is the record. With ``M >= (C / |X|)^2`` rows the gradient always reaches the
    clipping bound, so the noise on the mean of the rows is ``noise_multiplier * |X|`` for each
    value, and no readout can lower the noise. The attacker knows the record's norm and all other
    records of the batch, and the others' contribution is taken as subtracted: each record is alone
    in its update.

    Args:
        images: [B, ...], the records, none of them zero.
        noise_multiplier: std of the noise divided by max_grad_norm, >= 0.
        max_grad_norm: bound C on one record's gradient, > 0.
        updates: private steps that contain the record; their gradients are averaged.
        noise_generator: replaces the engine's generator, for tests.
        on_progress: called after each record.

    Returns:
        Candidates [B, ...], one for each record, ``X + N(0, (noise_multiplier |X|)^2 / updates)``.

    Raises:
        ValueError: a record is zero, or an argument is out of range.
    """
    flat = images.flatten(1).float()
    norms = torch.linalg.vector_norm(flat, dim=1)
    if not bool((norms > 0).all()):
        raise ValueError("images: a record is zero everywhere, expected records with some signal")
    rows = max(1, math.ceil((max_grad_norm / float(norms.min())) ** 2))
    model = nn.Linear(flat.shape[1], rows, bias=False, device=images.device)
    server = Server(
        model,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        batch_size=1,
        noise_generator=noise_generator,
    )
    candidates = torch.empty_like(flat)
    for index, norm in enumerate(norms.tolist()):
        (seen,) = server.released(
            flat[index : index + 1],
            lambda output: output.sum(dim=1).mean(),
            [model.weight],
            updates,
        )
        candidates[index] = seen.mean(dim=0) * max(1.0, norm * math.sqrt(rows) / max_grad_norm)
        on_progress()
    return candidates.reshape(images.shape)
