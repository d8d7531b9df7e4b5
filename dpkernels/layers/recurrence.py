"""Recurrences over time, backwards by hand: LSTM, GRU and RNN cells on packed steps.

Steps are packed as in ``torch.nn.utils.rnn.PackedSequence``: ``data`` is [N, F], step t holds the
``sizes[t]`` samples that are still running, longest first, N = sum of sizes. A padded batch is the
case where all sizes are equal. Backpropagation through time returns the gradients at the two
projections of every step, [N, gates * H], from which per-sample weight gradients are one batched
product each (docs/math.md, section 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

aten = torch.ops.aten


@dataclass(frozen=True)
class Steps:
    """The order of time: samples per step, and whether the last step comes first."""

    sizes: list[int]
    reverse: bool

    def order(self) -> Iterable[int]:
        """Indices of steps in the order in which the cell takes them."""
        steps = range(len(self.sizes))
        return reversed(steps) if self.reverse else steps

    def split(self, data: torch.Tensor) -> Sequence[torch.Tensor]:
        """[N, ...] -> one view per step."""
        return data.split(self.sizes)


@dataclass(frozen=True)
class Weights:
    """One layer in one direction: [gates * H, I], [gates * H, P], [P, H] or None; out of autograd.

    Attributes:
        bias: [gates * H] or None: what is added to the input's projection.
        bias_hh: [gates * H] or None: what is added to the state's projection beside it (GRU).
    """

    input: torch.Tensor
    state: torch.Tensor
    projection: torch.Tensor | None
    bias: torch.Tensor | None
    bias_hh: torch.Tensor | None


@dataclass(frozen=True)
class Backprops:
    """What backpropagation through time returns.

    Attributes:
        input: [N, gates * H]: gradient at the input's projection.
        state: [N, gates * H]: gradient at the state's projection.
        projection: [N, P] or None: gradient at the projected output.
        first: gradients of the first states.
    """

    input: torch.Tensor
    state: torch.Tensor
    projection: torch.Tensor | None
    first: tuple[torch.Tensor, ...]


class Cell(Protocol):
    """The step of a recurrence and its derivative; stateless."""

    #: whether the biases of both projections add up to one
    one_bias: bool

    def forward(
        self, gates: torch.Tensor, first: tuple[torch.Tensor, ...], weights: Weights, steps: Steps
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], list[torch.Tensor]]:
        """Run over time.

        Args:
            gates: [N, gates * H]: projections of the input; overwritten.
            first: the first states, [B, P] and, for the LSTM, [B, H].
            weights: of this layer and direction.
            steps: the order of time.

        Returns:
            Outputs [N, P]; last states; what :meth:`backward` needs, the states before each step,
            [N, P], first.
        """

    def backward(
        self,
        saved: Sequence[torch.Tensor],
        weights: Weights,
        steps: Steps,
        grad_output: torch.Tensor,
        grad_last: tuple[torch.Tensor, ...],
    ) -> Backprops:
        """Run back in time; `grad_output` is [N, P], `grad_last` the gradients of last states."""


def _running(state: torch.Tensor, size: int) -> torch.Tensor:
    """The samples of a state that a step takes."""
    return state if len(state) == size else state[:size]


def _replaced(state: torch.Tensor, running: torch.Tensor) -> torch.Tensor:
    """The state after a step that took its first samples."""
    if len(state) == len(running):
        return running
    return torch.cat([running, state[len(running) :]])


class RNNCell:
    """h' = act(W x + R h + b)."""

    one_bias = True

    def __init__(self, activation: str):
        self.activation = activation

    def forward(
        self, gates: torch.Tensor, first: tuple[torch.Tensor, ...], weights: Weights, steps: Steps
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], list[torch.Tensor]]:
        (h,) = first
        recurrent = weights.state.t()
        step = steps.split(gates)
        before: list[torch.Tensor] = [h] * len(step)
        for t in steps.order():
            before[t] = _running(h, steps.sizes[t])
            new = step[t].addmm_(before[t], recurrent)
            h = _replaced(h, new.tanh_() if self.activation == "tanh" else new.relu_())
        return gates, (h.clone(),), [torch.cat(before), gates]

    def backward(
        self,
        saved: Sequence[torch.Tensor],
        weights: Weights,
        steps: Steps,
        grad_output: torch.Tensor,
        grad_last: tuple[torch.Tensor, ...],
    ) -> Backprops:
        _, output = saved
        slope = 1 - output.square() if self.activation == "tanh" else (output > 0).to(output.dtype)
        slopes, outer = steps.split(slope), steps.split(grad_output)
        grad = torch.empty_like(output)
        step = steps.split(grad)
        (dh,) = grad_last
        for t in reversed(list(steps.order())):
            torch.mul(_running(dh, steps.sizes[t]) + outer[t], slopes[t], out=step[t])
            dh = _replaced(dh, step[t] @ weights.state)
        return Backprops(grad, grad, None, (dh,))


class GRUCell:
    """r, z = sigmoid(W x + R h); n = tanh(W x + r * (R h)); h' = (1 - z) n + z h."""

    one_bias = False

    def forward(
        self, gates: torch.Tensor, first: tuple[torch.Tensor, ...], weights: Weights, steps: Steps
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], list[torch.Tensor]]:
        (h,) = first
        width = h.shape[1]
        recurrent = weights.state.t()
        output, candidate = (gates.new_empty(len(gates), width) for _ in range(2))
        step = steps.split(gates)
        outputs, candidates = steps.split(output), steps.split(candidate)
        before: list[torch.Tensor] = [h] * len(step)
        for t in steps.order():
            now = before[t] = _running(h, steps.sizes[t])
            if weights.bias_hh is None:
                projected = now @ recurrent
            else:
                projected = torch.addmm(weights.bias_hh, now, recurrent)
            reset_update, new = step[t].tensor_split([2 * width], 1)
            reset_update.add_(projected[:, : 2 * width]).sigmoid_()
            reset, update = reset_update.chunk(2, 1)
            candidates[t].copy_(projected[:, 2 * width :])
            new.addcmul_(reset, candidates[t]).tanh_()
            h = _replaced(h, torch.lerp(new, now, update, out=outputs[t]))
        return output, (h.clone(),), [torch.cat(before), gates, candidate]

    def backward(
        self,
        saved: Sequence[torch.Tensor],
        weights: Weights,
        steps: Steps,
        grad_output: torch.Tensor,
        grad_last: tuple[torch.Tensor, ...],
    ) -> Backprops:
        before, gates, candidate = saved
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
        factors, updates, outer = map(steps.split, (to_gates, update, grad_output))
        step, grads = steps.split(grad_gates), steps.split(grad_h)
        per_gate = steps.split(grad_gates.unflatten(1, (3, -1)))
        (dh,) = grad_last
        for t in reversed(list(steps.order())):
            now = torch.add(_running(dh, steps.sizes[t]), outer[t], out=grads[t])
            torch.mul(factors[t], now.unsqueeze(1), out=per_gate[t])
            dh = _replaced(dh, torch.addmm(now * updates[t], step[t], weights.state))
        width = before.shape[1]
        at_input = torch.cat([grad_gates[:, : 2 * width], grad_h * to_new], 1)
        return Backprops(at_input, grad_gates, None, (dh,))


class LSTMCell:
    """i, f, g, o = W x + R h; c' = f c + i g; h' = o tanh(c'), projected where asked."""

    one_bias = True

    def forward(
        self, gates: torch.Tensor, first: tuple[torch.Tensor, ...], weights: Weights, steps: Steps
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], list[torch.Tensor]]:
        h, c = first
        width = c.shape[1]
        recurrent = weights.state.t()
        cell, cell_tanh, hidden = (gates.new_empty(len(gates), width) for _ in range(3))
        cells, tanhs, hiddens = map(steps.split, (cell, cell_tanh, hidden))
        step, ins, forgets, news, outs = map(steps.split, (gates, *gates.chunk(4, 1)))
        in_forgets = steps.split(gates[:, : 2 * width])
        output, outputs = hidden, hiddens
        if weights.projection is not None:
            output = gates.new_empty(len(gates), len(weights.projection))
            outputs = steps.split(output)
        before: list[torch.Tensor] = [h] * len(step)
        before_c: list[torch.Tensor] = [c] * len(step)
        for t in steps.order():
            before[t], before_c[t] = _running(h, steps.sizes[t]), _running(c, steps.sizes[t])
            step[t].addmm_(before[t], recurrent)
            in_forgets[t].sigmoid_()
            news[t].tanh_()
            outs[t].sigmoid_()
            torch.mul(forgets[t], before_c[t], out=cells[t]).addcmul_(ins[t], news[t])
            torch.mul(outs[t], torch.tanh(cells[t], out=tanhs[t]), out=hiddens[t])
            if weights.projection is not None:
                torch.mm(hiddens[t], weights.projection.t(), out=outputs[t])
            h, c = _replaced(h, outputs[t]), _replaced(c, cells[t])
        saved = [torch.cat(before), gates, torch.cat(before_c), cell_tanh]
        if weights.projection is not None:
            saved.append(hidden)
        return output, (h.clone(), c.clone()), saved

    def backward(
        self,
        saved: Sequence[torch.Tensor],
        weights: Weights,
        steps: Steps,
        grad_output: torch.Tensor,
        grad_last: tuple[torch.Tensor, ...],
    ) -> Backprops:
        _, gates, before_c, cell_tanh, *_ = saved
        into, forget, new, out = gates.chunk(4, 1)
        factor = torch.addcmul(gates, gates, gates, value=-1.0)
        at_into, at_forget, at_new, at_out = factor.chunk(4, 1)
        at_into.mul_(new)
        at_forget.mul_(before_c)
        at_new.copy_(aten.tanh_backward(into, new))
        at_out.mul_(cell_tanh)
        to_cell = aten.tanh_backward(out, cell_tanh)
        grad_gates = torch.empty_like(gates)
        step = steps.split(grad_gates)
        per_gate, factors = (
            steps.split(t.unflatten(1, (4, -1))[:, :3]) for t in (grad_gates, factor)
        )
        out_gates, to_outs = (steps.split(t.chunk(4, 1)[3]) for t in (grad_gates, factor))
        to_cells, forgets, outer = map(steps.split, (to_cell, forget, grad_output))
        projected = torch.empty_like(grad_output) if weights.projection is not None else None
        projections = None if projected is None else steps.split(projected)
        dh, dc = grad_last
        for t in reversed(list(steps.order())):
            now = _running(dh, steps.sizes[t]) + outer[t]
            if projections is not None:
                now = projections[t].copy_(now) @ weights.projection
            at_cell = torch.addcmul(_running(dc, steps.sizes[t]), now, to_cells[t])
            torch.mul(factors[t], at_cell.unsqueeze(1), out=per_gate[t])
            torch.mul(to_outs[t], now, out=out_gates[t])
            dc = _replaced(dc, at_cell * forgets[t])
            dh = _replaced(dh, step[t] @ weights.state)
        return Backprops(grad_gates, grad_gates, projected, (dh, dc))
