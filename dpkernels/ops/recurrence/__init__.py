"""An LSTM over time, and back: what per-sample gradients need of every step (docs/math.md, 2).

    i, f, g, o = W x + R h + b,  c' = sigmoid(f) c + sigmoid(i) tanh(g),  h' = sigmoid(o) tanh(c')

and h' is multiplied by a projection where there is one. Steps are packed (`steps`).
"""

from __future__ import annotations

import torch

from dpkernels.ops.checks import require_float, require_shape
from dpkernels.ops.recurrence.records import Gradients, RecurrentWeights, Saved, State, Weights
from dpkernels.ops.recurrence.steps import Steps
from dpkernels.ops.registry import contract

__all__ = ["lstm", "lstm_backward"]


def _check_steps(sizes: list[int], rows: int, batch: int) -> None:
    if not sizes or min(sizes) < 1 or sizes != sorted(sizes, reverse=True):
        raise ValueError(f"sizes={sizes}: expected one number >= 1 per step, none above the former")
    if sizes[0] != batch or sum(sizes) != rows:
        raise ValueError(f"sizes={sizes}: expected {batch} first, and {rows} together")


def _check_dtypes(dtype: torch.dtype, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"{name}: dtype {tensor.dtype}, expected {dtype}, that of the rest")


def _check_lstm(data: torch.Tensor, weights: Weights, first: State, steps: Steps) -> None:
    require_float("data", data, 2)
    _check_dtypes(data.dtype, **weights._asdict(), **first._asdict())
    batch, width = first.c.shape
    _check_steps(steps.sizes, len(data), batch)
    _check_weights(weights.weight_hh, weights.weight_hr, width, first.h.shape[1])
    require_shape("h", first.h, [batch, weights.weight_hh.shape[1]])
    require_shape("weight_ih", weights.weight_ih, [4 * width, data.shape[1]])
    if weights.bias is not None:
        require_shape("bias", weights.bias, [4 * width])


def _check_weights(
    weight_hh: torch.Tensor, weight_hr: torch.Tensor | None, width: int, projected: int
) -> None:
    if weight_hr is None:
        require_shape("weight_hh", weight_hh, [4 * width, width])
    else:
        require_shape("weight_hh", weight_hh, [4 * width, projected])
        require_shape("weight_hr", weight_hr, [projected, width])


def _check_backward(
    grads: Gradients, saved: Saved, weights: RecurrentWeights, steps: Steps
) -> None:
    require_float("grad_output", grads.grad_output, 2)
    every = {**grads._asdict(), **saved._asdict(), **weights._asdict()}
    _check_dtypes(grads.grad_output.dtype, **every)
    rows, projected = grads.grad_output.shape
    batch, width = grads.grad_c.shape
    _check_steps(steps.sizes, rows, batch)
    _check_weights(*weights, width, projected)
    require_shape("grad_h", grads.grad_h, [batch, projected])
    require_shape("gates", saved.gates, [rows, 4 * width])
    require_shape("before_c", saved.before_c, [rows, width])
    require_shape("cell_tanh", saved.cell_tanh, [rows, width])


@contract(check=_check_lstm)
def lstm(data: torch.Tensor, weights: Weights, first: State, steps: Steps) -> list[torch.Tensor]:
    """One layer in one direction, over all steps.

    Args:
        data: [N, I], float16/bfloat16/float32/float64, the dtype of everything else.
        weight_ih: [4H, I]: input, forget, new and output gate.
        weight_hh: [4H, P].
        weight_hr: [P, H]; None for none, then P = H.
        bias: [4H] or None: the sum of both biases.
        h: [B, P], the first state.
        c: [B, H], the first cells.
        sizes: samples per step, B first, none above the former; their sum is N.
        reverse: whether the last step comes first.

    Returns:
        The outputs [N, P], the last h and c; then what :func:`lstm_backward` and the gradients of
        weights need: the states before each step [N, P], the gates' values [N, 4H], the cells
        before each step and tanh of those after it [N, H]; with a projection also what it
        multiplies, [N, H].

    Raises:
        ValueError: shapes do not fit.
    """
    rows, (batch, projected), width = data.shape[0], first.h.shape, first.c.shape[1]
    shapes = [(rows, projected), (batch, projected), (batch, width), (rows, projected)]
    shapes += [(rows, 4 * width), (rows, width), (rows, width)]
    if weights.weight_hr is not None:
        shapes.append((rows, width))
    return [data.new_empty(shape) for shape in shapes]


@contract(check=_check_backward)
def lstm_backward(
    grads: Gradients, saved: Saved, weights: RecurrentWeights, steps: Steps
) -> list[torch.Tensor]:
    """Back through the time of :func:`lstm`.

    Args:
        grad_output: [N, P], gradient at the outputs.
        grad_h: [B, P], gradient at the last h.
        grad_c: [B, H], gradient at the last c.
        gates: [N, 4H], as :func:`lstm` returned them; the next two likewise.
        before_c: [N, H].
        cell_tanh: [N, H].
        weight_hh: as :func:`lstm` had them; the next three likewise.
        weight_hr: [P, H] or None.
        sizes: samples per step.
        reverse: whether the last step comes first.

    Returns:
        Gradients at the sums of the gates, [N, 4H], and at the first h and c; with a projection
        also at its results, [N, P].
    """
    like = [saved.gates, grads.grad_h, grads.grad_c]
    if weights.weight_hr is not None:
        like.append(grads.grad_output)
    return [torch.empty_like(each) for each in like]
