"""Recurrences over time, backwards by hand: LSTM, GRU and RNN cells on packed steps.

Backpropagation through time returns the gradients at the two projections of every step,
[N, gates * H], from which per-sample weight gradients are one batched product each (docs/math.md,
section 2). Steps are packed: `dpkernels.ops.recurrence.steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional as F

from dpkernels import ops
from dpkernels.ops.recurrence.steps import Steps, replaced, running

aten = torch.ops.aten

#: the states of a layer in one direction: h, and c for the LSTM
States = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Weights:
    """Weights of one layer in one direction, detached from autograd.

    Attributes:
        input: [gates * H, I]: projects the input.
        state: [gates * H, P]: projects the state.
        projection: [P, H] or None: projects the output.
        bias: [gates * H] or None: added to the input's projection.
        bias_hh: [gates * H] or None: added to the state's projection (GRU).
    """

    input: torch.Tensor
    state: torch.Tensor
    projection: torch.Tensor | None
    bias: torch.Tensor | None
    bias_hh: torch.Tensor | None


class Run(NamedTuple):
    """One run over time, or, on the way back, the gradients at what the run returned.

    Attributes:
        output: [N, P]: the outputs of all steps.
        last: the last states.
        saved: what the way back needs; the first tensor has the states before each step, [N, P].
    """

    output: torch.Tensor
    last: States
    saved: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Backprops:
    """The gradients that backpropagation through time returns.

    Attributes:
        input: [N, gates * H]: gradient at the input's projection.
        state: [N, gates * H]: gradient at the state's projection.
        projection: [N, P] or None: gradient at the projected output.
        first: gradients of the first states.
    """

    input: torch.Tensor
    state: torch.Tensor
    projection: torch.Tensor | None
    first: States


class Cell(Protocol):
    """The step of a recurrence and its derivative; stateless."""

    #: whether the biases of both projections are added up to a single bias
    one_bias: bool

    def forward(self, data: torch.Tensor, first: States, weights: Weights, steps: Steps) -> Run:
        """Run over time.

        Args:
            data: [N, I]: the input of all steps.
            first: the first states, [B, P] and, for the LSTM, [B, H].
            weights: of this layer and direction.
            steps: the order of time.

        Returns:
            The outputs, the last states, and what :meth:`backward` needs of the run.
        """

    def backward(self, run: Run, weights: Weights, steps: Steps) -> Backprops:
        """Run back in time.

        Args:
            run: the gradients at outputs and last states, and what :meth:`forward` saved.
            weights: of this layer and direction.
            steps: the order of time.
        """


class RNNCell:
    """h' = act(W x + R h + b)."""

    one_bias = True

    def __init__(self, activation: str):
        self.activation = activation

    def forward(self, data: torch.Tensor, first: States, weights: Weights, steps: Steps) -> Run:
        (h,) = first
        gates = F.linear(data, weights.input, weights.bias)
        recurrent = weights.state.t()
        step = steps.split(gates)
        before: list[torch.Tensor] = [h] * len(step)
        for t in steps.order():
            before[t] = running(h, steps.sizes[t])
            new = step[t].addmm_(before[t], recurrent)
            h = replaced(h, new.tanh_() if self.activation == "tanh" else new.relu_())
        return Run(gates, (h.clone(),), [torch.cat(before), gates])

    def backward(self, run: Run, weights: Weights, steps: Steps) -> Backprops:
        _, output = run.saved
        slope = 1 - output.square() if self.activation == "tanh" else (output > 0).to(output.dtype)
        slopes, outer = steps.split(slope), steps.split(run.output)
        grad = torch.empty_like(output)
        step = steps.split(grad)
        (dh,) = run.last
        for t in reversed(list(steps.order())):
            torch.mul(running(dh, steps.sizes[t]) + outer[t], slopes[t], out=step[t])
            dh = replaced(dh, step[t] @ weights.state)
        return Backprops(grad, grad, None, (dh,))


class GRUCell:
    """r, z = sigmoid(W x + R h); n = tanh(W x + r * (R h)); h' = (1 - z) n + z h."""

    one_bias = False

    def forward(self, data: torch.Tensor, first: States, weights: Weights, steps: Steps) -> Run:
        (h,) = first
        gates = F.linear(data, weights.input, weights.bias)
        width = h.shape[1]
        recurrent = weights.state.t()
        output, candidate = (gates.new_empty(len(gates), width) for _ in range(2))
        step = steps.split(gates)
        outputs, candidates = steps.split(output), steps.split(candidate)
        before: list[torch.Tensor] = [h] * len(step)
        for t in steps.order():
            now = before[t] = running(h, steps.sizes[t])
            if weights.bias_hh is None:
                projected = now @ recurrent
            else:
                projected = torch.addmm(weights.bias_hh, now, recurrent)
            reset_update, new = step[t].tensor_split([2 * width], 1)
            reset_update.add_(projected[:, : 2 * width]).sigmoid_()
            reset, update = reset_update.chunk(2, 1)
            candidates[t].copy_(projected[:, 2 * width :])
            new.addcmul_(reset, candidates[t]).tanh_()
            h = replaced(h, torch.lerp(new, now, update, out=outputs[t]))
        return Run(output, (h.clone(),), [torch.cat(before), gates, candidate])

    def backward(self, run: Run, weights: Weights, steps: Steps) -> Backprops:
        before, gates, candidate = run.saved
        reset, update, new = gates.chunk(3, 1)
        to_new = (1 - update) * (1 - new.square())
        to_gates = torch.stack(
            [
                aten.sigmoid_backward(to_new * candidate, reset),
                aten.sigmoid_backward(before - new, update),
                to_new * reset,
            ],
            1,
        )
        grad_gates, grad_h = torch.empty_like(gates), torch.empty_like(before)
        factors, updates, outer = map(steps.split, (to_gates, update, run.output))
        step, grads = steps.split(grad_gates), steps.split(grad_h)
        per_gate = steps.split(grad_gates.unflatten(1, (3, -1)))
        (dh,) = run.last
        for t in reversed(list(steps.order())):
            now = torch.add(running(dh, steps.sizes[t]), outer[t], out=grads[t])
            torch.mul(factors[t], now.unsqueeze(1), out=per_gate[t])
            dh = replaced(dh, torch.addmm(now * updates[t], step[t], weights.state))
        width = before.shape[1]
        at_input = torch.cat([grad_gates[:, : 2 * width], grad_h * to_new], 1)
        return Backprops(at_input, grad_gates, None, (dh,))


class LSTMCell:
    """i, f, g, o = W x + R h; c' = f c + i g; h' = o tanh(c'), times the projection if any."""

    one_bias = True

    def forward(self, data: torch.Tensor, first: States, weights: Weights, steps: Steps) -> Run:
        products = weights.input, weights.state, weights.projection, weights.bias
        output, h, c, *saved = ops.lstm(data, *products, *first, steps.sizes, steps.reverse)
        return Run(output, (h, c), saved)

    def backward(self, run: Run, weights: Weights, steps: Steps) -> Backprops:
        _, gates, before_c, cell_tanh, *_ = run.saved
        at_gates, dh, dc, *projected = ops.lstm_backward(
            run.output,
            *run.last,
            gates,
            before_c,
            cell_tanh,
            weights.state,
            weights.projection,
            steps.sizes,
            steps.reverse,
        )
        return Backprops(at_gates, at_gates, projected[0] if projected else None, (dh, dc))
