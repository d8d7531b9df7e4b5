"""``nn.LSTM``, ``nn.GRU``, ``nn.RNN``, and Opacus' own: one batched product for all steps.

The layer runs decomposed: one product projects the input of all steps, a loop over time does the
rest, and backpropagation through time is done once, by hand (`recurrence`). On a GPU this gives up
the fused recurrent kernels of cuDNN, which do not return what per-sample gradients need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN
from opacus.layers.dp_rnn import DPGRUCell, DPLSTMCell, DPRNNCell
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from dpkernels.layers.composite import CompositeRule, Found, Part, Recorder, linear_operands
from dpkernels.layers.fold import without_samples
from dpkernels.layers.recurrent_cells import Cell, GRUCell, LSTMCell, RNNCell, Run, Weights
from dpkernels.ops.recurrence.steps import Steps

_CELLS: dict[str, Cell] = {
    "LSTM": LSTMCell(),
    "GRU": GRUCell(),
    "RNN_TANH": RNNCell("tanh"),
    "RNN_RELU": RNNCell("relu"),
}


@dataclass(frozen=True)
class _Direction:
    """The parameters of one layer in one direction; None where the layer has none."""

    weight_ih: Part
    weight_hh: Part
    bias_ih: Part | None
    bias_hh: Part | None
    weight_hr: Part | None

    def weights(self, one_bias: bool, dtype: torch.dtype) -> Weights:
        """What the recurrence computes with, out of autograd."""

        def value(part: Part | None) -> torch.Tensor | None:
            return None if part is None else part.value().to(dtype)

        bias, bias_hh = value(self.bias_ih), value(self.bias_hh)
        if one_bias and bias is not None:
            bias, bias_hh = bias + bias_hh, None
        return Weights(
            value(self.weight_ih), value(self.weight_hh), value(self.weight_hr), bias, bias_hh
        )


class _Padded:
    """A padded batch: every step has every row."""

    def __init__(self, input: torch.Tensor, batch_first: bool):
        self.batch_first = batch_first
        steps = input.transpose(0, 1) if batch_first else input
        self.length, self.rows = steps.shape[:2]
        self.data = steps.reshape(-1, steps.shape[2])
        self.sizes = [self.rows] * self.length

    def by_row(self, data: torch.Tensor) -> torch.Tensor:
        """[N, F] -> [rows, T, F]."""
        return data.unflatten(0, (self.length, self.rows)).transpose(0, 1)

    def output(self, data: torch.Tensor) -> torch.Tensor:
        """[N, F] -> what the layer returns."""
        rows = self.by_row(data)
        return rows if self.batch_first else rows.transpose(0, 1)

    def sorted(self, state: torch.Tensor) -> torch.Tensor:
        """[L, rows, F] -> the same, in the order of the steps' rows."""
        return state

    unsorted = sorted


class _Packed:
    """A PackedSequence: rows by length, the steps of all rows interleaved."""

    def __init__(self, input: PackedSequence):
        self.input = input
        self.data = input.data
        self.sizes = input.batch_sizes.tolist()
        self.rows = self.sizes[0]

    def by_row(self, data: torch.Tensor) -> torch.Tensor:
        """[N, F] -> [rows, T, F]: zeros behind the last step of a row."""
        return pad_packed_sequence(self.output(data), batch_first=True)[0]

    def output(self, data: torch.Tensor) -> PackedSequence:
        """[N, F] -> what the layer returns."""
        packed = self.input
        return PackedSequence(
            data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        )

    def sorted(self, state: torch.Tensor) -> torch.Tensor:
        """[L, rows, F] -> the same, in the order of the steps' rows."""
        index = self.input.sorted_indices
        return state if index is None else state.index_select(1, index)

    def unsorted(self, state: torch.Tensor) -> torch.Tensor:
        """[L, rows, F] in the order of the steps' rows -> in the batch's order."""
        index = self.input.unsorted_indices
        return state if index is None else state.index_select(1, index)


class _Recurrence(torch.autograd.Function):
    """One layer in one direction, over all steps."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        receive: Callable[..., None],
        cell: Cell,
        weights: Weights,
        steps: Steps,
        data: torch.Tensor,
        *first: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        output, last, saved = cell.forward(data, first, weights, steps)
        ctx.receive, ctx.cell, ctx.steps = receive, cell, steps
        ctx.projected = weights.projection is not None
        kept = [weights.input, weights.state, *([weights.projection] if ctx.projected else [])]
        ctx.save_for_backward(*kept, data, *saved)
        return output, *last

    @staticmethod
    def backward(
        ctx: Any, grad_output: torch.Tensor, *grad_last: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        weight, state, *saved = ctx.saved_tensors
        projection = saved.pop(0) if ctx.projected else None
        data, before, *rest = saved
        with torch.no_grad(), torch.autocast(data.device.type, enabled=False):
            weights = Weights(weight, state, projection, None, None)
            run = Run(grad_output.contiguous(), grad_last, [before, *rest])
            backprops = ctx.cell.backward(run, weights, ctx.steps)
            grad_data = backprops.input @ weight if ctx.needs_input_grad[5] else None
        hidden = rest[-1] if ctx.projected else None
        ctx.receive(data, before, hidden, backprops)
        return (None,) * 5 + (grad_data, *backprops.first)


class RecurrentRule(CompositeRule):
    """``nn.LSTM`` (also projected), ``nn.GRU``, ``nn.RNN``; padded or packed input."""

    handles = (nn.LSTM, nn.GRU, nn.RNN)
    #: the argument that holds the first states
    state_argument = "hx"

    def knows(self, module: Any) -> bool:
        own = {name for name, p in module._parameters.items() if p is not None}
        return own == set(module._flat_weights_names) and module.mode in _CELLS

    def rows(self, module: Any, arguments: dict[str, Any]) -> int:
        input = arguments["input"]
        if isinstance(input, PackedSequence):
            return int(input.batch_sizes[0])
        if input.ndim != 3:
            raise without_samples("input", input)
        return input.shape[0 if module.batch_first else 1]

    def run(self, module: Any, arguments: dict[str, Any], recorder: Recorder) -> Any:
        input = arguments["input"]
        packed = isinstance(input, PackedSequence)
        layout = _Packed(input) if packed else _Padded(input, module.batch_first)
        if not len(layout.data):
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        first = self._first_states(module, arguments.get(self.state_argument), layout)
        self.check(module, input, first)
        recorder.saw(layout.by_row(layout.data.detach()))
        device = layout.data.device.type
        if torch.is_autocast_enabled(device):
            layout.data = layout.data.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            data, last = self._layers(module, layout, first, recorder)
        states = tuple(layout.unsorted(torch.stack(kind)) for kind in zip(*last))
        return layout.output(data), states if self.mode(module) == "LSTM" else states[0]

    def mode(self, module: Any) -> str:
        """Which of the cells the layer has."""
        return module.mode

    def parameters(self, module: Any, name: str) -> Sequence[nn.Parameter | None]:
        """weight_ih, weight_hh, bias_ih, bias_hh, weight_hr of ``l0``, ``l0_reverse``, ..."""
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        return [getattr(module, f"{kind}_{name}", None) for kind in kinds]

    def check(self, module: Any, input: Any, first: Sequence[torch.Tensor]) -> None:
        """Raise as the layer itself does where input and first states do not fit it."""
        states = tuple(first) if module.mode == "LSTM" else first[0]
        if isinstance(input, PackedSequence):
            module.check_forward_args(input.data, states, input.batch_sizes)
        else:
            module.check_forward_args(input, states, None)

    def _first_states(self, module: Any, hx: Any, layout: Any) -> list[torch.Tensor]:
        """[L * directions, rows, P] and, for the LSTM, [L * directions, rows, H]."""
        if hx is not None:
            return [layout.sorted(s) for s in (hx if self.mode(module) == "LSTM" else (hx,))]
        count = module.num_layers * (2 if module.bidirectional else 1)
        widths = [module.proj_size or module.hidden_size]
        if self.mode(module) == "LSTM":
            widths.append(module.hidden_size)
        return [layout.data.new_zeros(count, layout.rows, width) for width in widths]

    def _layers(
        self, module: Any, layout: Any, first: Sequence[torch.Tensor], recorder: Recorder
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]:
        """The last layer's output, [N, P * directions], and each direction's last states."""
        data = layout.data
        last: list[tuple[torch.Tensor, ...]] = []
        suffixes = ("", "_reverse") if module.bidirectional else ("",)
        for layer in range(module.num_layers):
            outputs = []
            for suffix in suffixes:
                own = [s[len(last)].to(data.dtype) for s in first]
                output, *states = self._direction(
                    module, f"l{layer}{suffix}", layout, data, own, recorder
                )
                outputs.append(output)
                last.append(tuple(states))
            data = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
            if layer + 1 < module.num_layers:
                data = F.dropout(data, module.dropout, module.training)
        return data, last

    def _direction(
        self,
        module: Any,
        name: str,
        layout: Any,
        data: torch.Tensor,
        first: Sequence[torch.Tensor],
        recorder: Recorder,
    ) -> tuple[torch.Tensor, ...]:
        parameters = self.parameters(module, name)
        own = _Direction(*(None if p is None else Part(p) for p in parameters))
        cell = _CELLS[self.mode(module)]
        by_row = layout.by_row

        def operands(
            data: torch.Tensor, before: torch.Tensor, hidden: torch.Tensor | None, backprops: Any
        ) -> Found:
            at_input, at_state = by_row(backprops.input), by_row(backprops.state)
            biases = [own.bias_ih, own.bias_hh]
            at_first = 2 if cell.one_bias else 1
            yield from linear_operands(
                recorder, by_row(data), at_input, own.weight_ih, *biases[:at_first]
            )
            yield from linear_operands(
                recorder, by_row(before), at_state, own.weight_hh, *biases[at_first:]
            )
            if hidden is not None:
                at_output = by_row(backprops.projection)
                yield from linear_operands(recorder, by_row(hidden), at_output, own.weight_hr)

        def receive(*parts: Any) -> None:
            recorder.receive(by_row(parts[-1].input), operands(*parts))

        weights = own.weights(cell.one_bias, data.dtype)
        steps = Steps(layout.sizes, name.endswith("_reverse"))
        return _Recurrence.apply(recorder.anchor, receive, cell, weights, steps, data, *first)


class DPRecurrentRule(RecurrentRule):
    """Opacus' ``DPLSTM``, ``DPGRU`` and ``DPRNN``, whose cells are Linear layers of their own.

    Not with dropout, which Opacus draws at every step and feeds back: such a layer runs as it is.
    """

    handles = (DPLSTM, DPGRU, DPRNN)
    state_argument = "state_init"

    def knows(self, module: Any) -> bool:
        cells = {type(cell) for cell in module.cells}
        return not module.dropout and cells <= {DPLSTMCell, DPGRUCell, DPRNNCell}

    def mode(self, module: Any) -> str:
        if isinstance(module, DPRNN):
            return f"RNN_{module.cells[0].nonlinearity.upper()}"
        return "LSTM" if isinstance(module, DPLSTM) else "GRU"

    def parameters(self, module: Any, name: str) -> Sequence[nn.Parameter | None]:
        ih, hh = getattr(module, name).ih, getattr(module, name).hh
        return [ih.weight, hh.weight, ih.bias, hh.bias, None]

    def check(self, module: Any, input: Any, first: Sequence[torch.Tensor]) -> None:
        """Opacus checks nothing."""
