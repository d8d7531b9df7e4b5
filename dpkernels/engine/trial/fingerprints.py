"""What a trial run sees of each tensor that passes a layer: two sums per sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dpkernels import ops
from dpkernels.layers.fold import merge_rows
from dpkernels.layers.operands import Operand
from dpkernels.ops.checks import FLOAT_DTYPES

#: sums of squares above this, and finite, lose nothing to float32's range
_SMALLEST_SQUARES = 1e-30
#: values that are summed up in float64 at a time where others do
_PIECE = 2**16


@dataclass(frozen=True)
class Seen:
    """One tensor that passed by, and where its fingerprint stands: a row for each sample."""

    layer: str
    kind: str
    shape: torch.Size
    dtype: torch.dtype
    rows: slice


class Observer:
    """A sink that only looks: it keeps fingerprints and no gradients.

    Fingerprints stand in one block. Small blocks of their own would lie between those of a pass'
    activations, and when these are freed the heap could neither shrink nor serve the next pass.
    """

    trains = False

    def __init__(self) -> None:
        self.samples: int | None = None
        self.seen: list[Seen] = []
        #: by name, what the pass left in each buffer
        self.buffers: dict[str, torch.Tensor] = {}
        self._moments = torch.empty(0, 2, dtype=torch.float64)

    def reset(self) -> None:
        self.samples = None

    def begin(self, samples: int) -> None:
        self.samples = samples

    def add(self, parameter: nn.Parameter, operand: Operand, samples: int, layer: str) -> None:
        """Gradients are of no interest here."""

    def saw(self, layer: str, kind: str, rows: torch.Tensor, samples: int) -> None:
        in_memory = sorted(range(1, rows.ndim), key=rows.stride, reverse=True)
        flat = rows.detach().permute(0, *in_memory).reshape(len(rows), -1)
        moments = _moments(merge_rows(flat, samples))
        start = self.seen[-1].rows.stop if self.seen else 0
        own = slice(start, start + samples)
        self.seen.append(Seen(layer, kind, rows.shape, rows.dtype, own))
        while len(self._moments) < own.stop:
            room = self._moments.new_empty(max(len(self._moments), 64 * samples), 2)
            self._moments = torch.cat([self._moments, room])
        self._moments[own] = moments

    def fingerprint(self, seen: Seen) -> torch.Tensor:
        """[samples, 2]: sums and sums of squares per sample."""
        return self._moments[seen.rows]


def _moments(values: torch.Tensor) -> torch.Tensor:
    """[samples, 2] float64: sum and sum of squares of each row of `values` [samples, n]."""
    rows = values if values.dtype in FLOAT_DTYPES else values.double()
    channel, zero = rows.unsqueeze(1), rows.new_zeros(len(rows), 1)
    with ops.use_backend("auto"):
        # the gradients of scale and shift where the input is the gradient itself
        squares, sums = ops.normalization_grad_sample(channel, channel, zero, zero + 1)
    in_range = (squares > _SMALLEST_SQUARES) & squares.isfinite()
    if squares.dtype == torch.float64 or bool(in_range.all()):
        return torch.cat([sums, squares], 1).double()
    moments = torch.zeros(len(rows), 2, dtype=torch.float64, device=rows.device)
    for piece in rows.split(max(1, _PIECE // max(1, len(rows))), 1):
        moments += _moments(piece.double())
    return moments
