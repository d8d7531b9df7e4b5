"""What an LSTM takes: N rows of all steps, B samples, H cells, P states (docs/math.md, 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Weights(NamedTuple):
    """Of the gates' sums, [4H, I], [4H, P] and [4H]; of the projection [P, H]. None for none."""

    weight_ih: torch.Tensor
    weight_hh: torch.Tensor
    weight_hr: torch.Tensor | None
    bias: torch.Tensor | None


class RecurrentWeights(NamedTuple):
    """Those of :class:`Weights` that a step's gradient passes on its way to the step before."""

    weight_hh: torch.Tensor
    weight_hr: torch.Tensor | None


class State(NamedTuple):
    """Before the first step: [B, P] and [B, H]."""

    h: torch.Tensor
    c: torch.Tensor


class Saved(NamedTuple):
    """Of every step: the gates' values [N, 4H], the cells before it, tanh of those after it."""

    gates: torch.Tensor
    before_c: torch.Tensor
    cell_tanh: torch.Tensor


class Gradients(NamedTuple):
    """At the outputs [N, P], at the last h [B, P] and at the last c [B, H]."""

    grad_output: torch.Tensor
    grad_h: torch.Tensor
    grad_c: torch.Tensor
