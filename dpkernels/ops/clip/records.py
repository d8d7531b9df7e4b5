"""What the end of a step takes, in three parts; one entry of each list for each parameter."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sums(NamedTuple):
    """``out += sum_b clip_factor[b] * grad_sample[b]``: out [*shape], grad_sample [B, *shape]."""

    outs: list[torch.Tensor]
    grad_samples: list[torch.Tensor]
    clip_factors: list[torch.Tensor]


class Finish(NamedTuple):
    """``out = scale * (out + noise_std * z)``, z drawn with `key`."""

    noise_std: float
    scale: float
    key: torch.Tensor


class Places(NamedTuple):
    """The first block counter of each parameter's z, and whether to add to what `out` holds."""

    blocks: list[int]
    accumulate: list[bool]


NOTHING_MORE = Finish(0.0, 1.0, torch.zeros(4, dtype=torch.int64))
"""Neither noise nor a scale."""
