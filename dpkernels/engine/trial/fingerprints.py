"""Fingerprints of the tensors that pass a layer in a trial: two sums per sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpkernels import ops
from dpkernels.engine.capture.session import Sink
from dpkernels.ops.checks import FLOAT_DTYPES

#: finite sums of squares above this bound lose nothing to float32's range
_SMALLEST_SQUARES = 1e-30
#: number of values that are summed up in float64 at a time where the squares lose range
_PIECE = 2**16


@dataclass(frozen=True)
class Seen:
    """One tensor that passed by; `rows` of the fingerprints are the tensor's, one per sample."""

    layer: str
    kind: str
    shape: torch.Size
    dtype: torch.dtype
    rows: slice


class Fingerprints(Sink):
    """A sink that keeps fingerprints of the tensors that pass by, and no gradients.

    All fingerprints stand in one block of memory. Small blocks, one a fingerprint, would lie
    between a pass' activations: once the activations are freed, the heap could neither shrink nor
    serve the next pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        #: by name, what the pass left in each buffer
        self.buffers: dict[str, torch.Tensor] = {}
        self._moments = torch.empty(0, 2, dtype=torch.float64)

    def saw(self, layer: str, kind: str, rows: torch.Tensor, samples: int) -> None:
        in_memory = sorted(range(1, rows.ndim), key=rows.stride, reverse=True)
        flat = rows.detach().permute(0, *in_memory).reshape(samples, -1)
        moments = _moments(flat)
        start = self.seen[-1].rows.stop if self.seen else 0
        own = slice(start, start + samples)
        self.seen.append(Seen(layer, kind, rows.shape, rows.dtype, own))
        while len(self._moments) < own.stop:
            room = self._moments.new_empty(max(len(self._moments), 64 * samples), 2)
            self._moments = torch.cat([self._moments, room])
        self._moments[own] = moments

    def finite(self) -> torch.Tensor:
        """[samples]: whether all fingerprints of a sample are finite."""
        each = [self.fingerprint(seen).isfinite().all(1) for seen in self.seen]
        return torch.stack(each).all(0) if each else torch.tensor(True)

    def fingerprint(self, seen: Seen) -> torch.Tensor:
        """[samples, 2]: sums and sums of squares per sample."""
        return self._moments[seen.rows]


def _moments(values: torch.Tensor) -> torch.Tensor:
    """[samples, 2] float64: sum and sum of squares of each row of `values` [samples, n]."""
    rows = values if values.dtype in FLOAT_DTYPES else values.double()
    channel, zero = rows.unsqueeze(1), rows.new_zeros(len(rows), 1)
    with ops.use_backend("auto"):
        # of (x, x, mean 0, rstd 1): sum(x * x) and sum(x), both in one fused pass
        squares, sums = ops.normalization_grad_sample(channel, channel, zero, zero + 1)
    in_range = (squares > _SMALLEST_SQUARES) & squares.isfinite()
    if squares.dtype == torch.float64 or bool(in_range.all()):
        return torch.cat([sums, squares], 1).double()
    moments = torch.zeros(len(rows), 2, dtype=torch.float64, device=rows.device)
    for piece in rows.split(max(1, _PIECE // max(1, len(rows))), 1):
        moments += _moments(piece.double())
    return moments
