"""The strategies for a parameter's norm and clipped sum, and the cost of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: every strategy of a plan (docs/math.md, section 2)
STRATEGIES = ("store", "gram", "channel_gram", "recompute", "single")


@dataclass(frozen=True)
class Cost:
    """What a strategy costs for one operand, norm and clipped sum together.

    The planner adds nothing to a cost.

    Attributes:
        flops: floating-point operations.
        traffic: bytes moved beyond reading the operand once.
        kept: bytes held from the layer's backward until the end of the backward pass.
    """

    flops: float
    traffic: float
    kept: int


#: by strategy: its cost, or why the strategy is not on offer
Offers = dict[str, Cost | str]


def nbytes(*tensors: torch.Tensor) -> int:
    """Bytes of the tensors' values."""
    return sum(t.numel() * t.element_size() for t in tensors)


def stored_bytes(samples: int, numel: int, like: torch.Tensor) -> int:
    """Bytes of `samples` gradients of `numel` values: float32, float64 where `like` is."""
    return samples * numel * (8 if like.dtype == torch.float64 else 4)


def offers(
    samples: int,
    gradient: float,
    stored: int,
    stash: int,
    gram: str,
    gram_flops: float | str,
    recompute: str | None = None,
) -> Offers:
    """The offers of an operand whose gradients are products.

    Args:
        samples: number of samples.
        gradient: floating-point operations to form all per-sample gradients; their clipped sum
            takes as many.
        stored: bytes of all per-sample gradients.
        stash: bytes of the factors.
        gram: which Gram strategy the operand has, ``"gram"`` or ``"channel_gram"``.
        gram_flops: the Gram strategy's operations for the norms, or why it is not on offer.
        recompute: why gradients are not formed twice; None if they may be.
    """
    other = {"gram": "channel_gram", "channel_gram": "gram"}[gram]
    only = {"gram": "only for linear layers and embeddings", "channel_gram": "only convolutions"}
    formed = Cost(gradient + stored / 2, 2.0 * stored, stored)
    one = samples == 1
    return {
        "store": "one sample: single keeps the same buffer" if one else formed,
        gram: gram_flops
        if isinstance(gram_flops, str)
        else Cost(gradient + gram_flops, 2.0 * stash, stash),
        other: only[other],
        "recompute": recompute or Cost(2 * gradient + stored / 2, 2.0 * stored, stash),
        "single": formed if one else f"{samples} samples in the batch, not one",
    }


def stored_offers(samples: int, stored: int) -> Offers:
    """The offers of per-sample gradients that exist already."""
    name, other = ("single", "store") if samples == 1 else ("store", "single")
    return {
        **dict.fromkeys(STRATEGIES, "the layer's backward returns the gradients themselves"),
        other: f"{samples} sample{'s' * (samples != 1)} in the batch",
        name: Cost(stored / 2, 1.0 * stored, stored),
    }
