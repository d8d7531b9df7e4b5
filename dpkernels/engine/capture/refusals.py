"""What is raised where per-sample gradients cannot be told apart."""

from __future__ import annotations

import torch


class NotPerSample(ValueError):
    """No per-sample gradient can be told apart; the message names the module and the remedy."""


class Untried(NotPerSample):
    """A layer met rows that no trial has met: the batch under way must be tried too."""


def refuse_transformed(x: torch.Tensor, layer: str) -> None:
    """Raise where a layer's input is a tensor of a transformation of torch.func."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise NotPerSample(
            f"{layer}: it is called under torch.vmap or another transformation of torch.func, "
            "which hides the samples from the layer; call the layer on the batch itself, or freeze "
            "it"
        )
