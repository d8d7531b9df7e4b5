"""Fingerprints of the tensors that pass by in a pass of a trial: a few sums per sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from dpkernels import ops
from dpkernels.engine.capture.session import CRITERION, Sink
from dpkernels.layers.operands import Operand, StoredOperand


class Seen(NamedTuple):
    """One tensor that passed by.

    Attributes:
        layer: name of the layer; "" for the model.
        kind: "activations", "backprops", "gradients of ...", "values of output ..."
            or CRITERION.
        backward: which outputs are differentiated, BATCHED or SCALAR; "" in the forward pass.
        shape: of the tensor, sample axis first.
    """

    layer: str
    kind: str
    backward: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def where(self) -> str:
        """The subject of a sentence about the tensor."""
        if self.kind == CRITERION:
            return "criterion"
        return f"layer {self.layer!r}" if self.layer else "model"


class Fingerprints(Sink):
    """A sink that keeps fingerprints of the tensors that pass by, and no gradients.

    All fingerprints stand in one block of memory. Small blocks, one a fingerprint, would lie
    between a pass' activations: once the activations are freed, the heap could neither shrink nor
    serve the next pass.

    Attributes:
        backward: which outputs are differentiated, as in :class:`Seen`.
        left: by name, what the pass changed of what the model keeps.
        drawn: what tells how many random numbers of torch the forward pass drew.
        kept: the tensor at place `keep`, sample axis first.

    Args:
        samples: number of samples.
        name_of: the name of a parameter.
        keep: place of a tensor to keep a copy of; None: none.
        room: number of tensors for which there is room in the block at first.
    """

    def __init__(
        self,
        samples: int,
        name_of: Callable[[nn.Parameter], str],
        keep: int | None = None,
        room: int = 16,
    ) -> None:
        super().__init__()
        self.kept: torch.Tensor | None = None
        self._keep = keep
        self.seen: list[Seen] = []
        self.backward = ""
        self.left: dict[str, Any] = {}
        self.drawn: tuple[Any, ...] = ()
        self._name_of = name_of
        self._count = samples
        self._room = room
        self._bits = torch.empty(0, samples, 2, dtype=torch.int64)
        self._moments = torch.empty(0, samples, 3, dtype=torch.float64)

    def saw(self, layer: str, kind: str, rows: torch.Tensor, samples: int) -> None:
        if samples != self._count or rows.shape[0] % samples:
            return
        place = len(self.seen)
        if place == self._keep:
            self.kept = rows.detach().clone()
        if place == len(self._bits):
            self._grow(rows.device)
        by_sample = rows if len(rows) == samples else rows.detach().unflatten(0, (samples, -1))
        self._bits[place], self._moments[place] = ops.fingerprint(by_sample)
        self.seen.append(Seen(layer, kind, self.backward, rows.shape, rows.dtype))

    def _grow(self, device: torch.device) -> None:
        """Make room for more tensors, on the device where tensors are: nobody waits for it."""
        more = max(len(self._bits), self._room)
        self._bits, self._moments = (
            torch.cat([block.to(device), block.new_empty(more, *block.shape[1:], device=device)])
            for block in (self._bits, self._moments)
        )

    def add(self, parameter: nn.Parameter, operand: Operand, samples: int, layer: str) -> None:
        if isinstance(operand, StoredOperand):
            kind = f"gradients of {self._name_of(parameter)!r}"
            self.saw(layer, kind, operand.grad_sample(), samples)

    @property
    def bits(self) -> torch.Tensor:
        """int64 [seen, samples, 2]."""
        return self._bits[: len(self.seen)].cpu()

    @property
    def moments(self) -> torch.Tensor:
        """float64 [seen, samples, 3]: sum, sum of squares, sum with signs by position."""
        return self._moments[: len(self.seen)].cpu()
