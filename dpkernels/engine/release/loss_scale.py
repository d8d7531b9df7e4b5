"""fp16 training with a ``torch.amp.GradScaler``: the loss is scaled, the clipped gradient is not.

The scale comes off each sample's gradient before norms are taken (docs/pitfalls.md, "The backward
pass"), so after ``backward()`` gradients are private and unscaled, and the scaler has nothing left
to do: its step is always taken, and its scale never moves.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from opacus.optimizers import DPOptimizer

_REMEDY = (
    "Pass the scaler to the engine, make_private(..., grad_scaler=scaler), or use bfloat16 "
    "autocast, which needs none (GradScaler(enabled=False) keeps the loop as it is)"
)


class ScaledLossOptimizer(DPOptimizer):
    """The part of the optimizer that knows about loss scaling.

    Guarantees:
        The scale never depends on data: only the caller changes the scale, by
        ``scaler.update(new_scale)``. A sample whose gradient is not finite contributes zero, which
        is a function of that sample alone, and no step is skipped because of such a sample.
    """

    _grad_scaler: torch.amp.GradScaler | None = None

    def attach_grad_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        """Take the scale of this scaler off every gradient from now on, and freeze the scale.

        Growth and backoff follow whether some sample overflowed, which is private; gradients with
        noise are always finite, so the scale could only grow until every sample overflows.

        Args:
            scaler: scales the loss as ``scaler.scale(loss).backward()``; None for an ordinary loss.
        """
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise ValueError(
                f"grad_scaler: {type(scaler).__name__}, expected a torch.amp.GradScaler"
            )
        self._grad_scaler = scaler

    def loss_scale(self) -> float:
        """The scale of the loss of the backward pass under way; 1 without a scaler."""
        if self._grad_scaler is None:
            return 1.0
        self._grad_scaler.set_growth_factor(1.0)  # each time: load_state_dict() brings others back
        return float(self._grad_scaler.get_scale())

    def drops_overflow(self) -> bool:
        """Whether a sample with a gradient that is not finite counts as zero, not as an error."""
        return self._grad_scaler is not None and self._grad_scaler.is_enabled()

    @property
    def grad_scale(self) -> float:
        """Always 1: gradients are never left scaled."""
        return 1.0

    @grad_scale.setter
    def grad_scale(self, scale: torch.Tensor | float | None) -> None:
        if not self.drops_overflow() or float(scale or 0.0) != self.loss_scale():
            raise ValueError(
                "GradScaler: the gradient was clipped and noised at the end of backward(), on a "
                "loss whose scale the engine does not know, so unscaling it now would clip at "
                f"another bound than max_grad_norm. {_REMEDY}"
            )

    @grad_scale.deleter
    def grad_scale(self) -> None:
        """Nothing to do: ``GradScaler.step`` deletes the attribute that it has set."""

    #: makes ``GradScaler.step`` hand over the scale instead of unscaling the gradients
    _step_supports_amp_scaling = True

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups.

        Raises:
            ValueError: the caller is ``GradScaler.unscale_``, recognised by name here, where it
                looks for the gradients, because ``step()`` could find no trace of the call.
        """
        caller = sys._getframe(1)
        before = caller.f_back if caller.f_code.co_name == "_unscale_grads_" else None
        if before is not None and before.f_code.co_name == "unscale_":
            raise ValueError(
                "scaler.unscale_(optimizer): gradients are unscaled and private after backward(), "
                f"and would be divided by the scale again; drop the call. {_REMEDY}"
            )
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.original_optimizer.param_groups = param_groups


def warn_of_overflow(norm_sq: torch.Tensor) -> None:
    """Tell the operator how many samples, of `norm_sq` [B], were dropped as not finite."""
    dropped = int((~norm_sq.isfinite()).sum())
    if dropped:
        warnings.warn(
            f"{dropped} of {len(norm_sq)} samples have a gradient that is not finite and count as "
            "zero; if this goes on, choose a smaller GradScaler(init_scale=...). This message is "
            "for who runs the training: it is not private",
            stacklevel=2,
        )
