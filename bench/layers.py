"""Single layers, whose gradients are measured alone: their shapes, tensors and library calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from dpkernels.ops.conv import cpu, library, tiles
from dpkernels.ops.conv.geometry import Geometry

#: (shape) -> a tensor of standard normals
Randn = Callable[..., torch.Tensor]
#: of a layer: activations (or input) and backprops
Pair = tuple[torch.Tensor, torch.Tensor]
Calls = dict[str, Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Linear:
    """``nn.Linear`` without bias on [batch, positions, inputs]; `weights` is their number."""

    batch: int
    positions: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"B={self.batch} T={self.positions} {self.inputs}->{self.outputs}"

    @property
    def geometry(self) -> tuple[()]:
        """What the ops take beside the tensors: nothing."""
        return ()

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def input_positions(self) -> int:
        return self.positions

    def smaller(self, by: int) -> Linear:
        """With positions and widths divided."""
        sizes = (max(1, size // by) for size in (self.positions, self.inputs, self.outputs))
        return Linear(self.batch, *sizes)

    def operands(self, randn: Randn = torch.randn) -> Pair:
        """[B, T, I] and [B, T, O]."""
        rows = (self.batch, self.positions)
        return randn(*rows, self.inputs), randn(*rows, self.outputs)

    def library(self, pair: Pair) -> Calls:
        """``batch``: PyTorch's one weight gradient of the whole batch."""
        activations, backprops = (tensor.flatten(0, 1) for tensor in pair)
        return {"batch": lambda: backprops.T @ activations}


@dataclass(frozen=True)
class Conv:
    """A convolution without bias on [batch, inputs, *[side] * axes], padded by half its kernel."""

    batch: int
    inputs: int
    outputs: int
    side: int
    kernel: int = 3
    stride: int = 1
    axes: int = 3
    groups: int = 1

    def __str__(self) -> str:
        size = f"{self.side}^{self.axes} k={self.kernel} s={self.stride}"
        groups = "" if self.groups == 1 else f" g={self.groups}"
        return f"B={self.batch} {self.inputs}->{self.outputs} {size}{groups}"

    @property
    def geometry(self) -> Geometry:
        """What the ops take beside the tensors."""
        shape = (self.outputs, self.inputs // self.groups, *[self.kernel] * self.axes)
        each = ((n,) * self.axes for n in (self.stride, self._padding, 1))
        return Geometry(shape, *each, self.groups)

    @property
    def weights(self) -> int:
        return self.geometry.weights

    @property
    def positions(self) -> int:
        """Of the output."""
        return self._reached**self.axes

    @property
    def input_positions(self) -> int:
        return self.side**self.axes

    @property
    def _padding(self) -> int:
        return self.kernel // 2 if self.kernel % 2 else 0

    @property
    def _reached(self) -> int:
        return (self.side + 2 * self._padding - self.kernel) // self.stride + 1

    def smaller(self, by: int) -> Conv:
        """With its sides divided."""
        return replace(self, side=max(2, self.side // by))

    def operands(self, randn: Randn = torch.randn) -> Pair:
        """[B, Cin, *S] and [B, Cout, *S']."""
        input = randn(self.batch, self.inputs, *[self.side] * self.axes)
        return input, randn(self.batch, self.outputs, *[self._reached] * self.axes)

    def library(self, pair: Pair) -> Calls:
        """``batch``, as for a Linear; ``grouped`` and ``looped`` form the per-sample gradients."""
        shape, *geometry, groups = self.geometry
        weight, outer, wanted = pair[0].new_ones(shape), [0] * self.axes, [False, True, False]

        def batch() -> torch.Tensor:
            how = (weight, None, *geometry, False, outer, groups, wanted)
            return torch.ops.aten.convolution_backward(pair[1], pair[0], *how)[1]

        each = forms(*pair, self.geometry)
        return {"batch": batch, "grouped": each["grouped"], "looped": each["looped"]}


#: what the convolution's CPU backend chooses from
_FORMS = {
    "tiles": tiles.grad_sample,
    "grouped": library.grouped_grad_sample,
    "looped": library.looped_grad_sample,
}


def forms(input: torch.Tensor, backprops: torch.Tensor, geometry: Geometry) -> Calls:
    """Ways to form a convolution's per-sample gradients on a CPU."""
    return {name: partial(form, input, backprops, geometry) for name, form in _FORMS.items()}


def chosen_form(input: torch.Tensor, backprops: torch.Tensor, geometry: Geometry) -> str:
    """Which of them, or which other one, the CPU backend takes."""
    form = cpu.strategy(input, backprops, geometry)
    return f"{form.__module__.rpartition('.')[2]}.{form.__name__}"
