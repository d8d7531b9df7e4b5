"""Shapes, geometries and memory layouts on which kernels tend to break."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dpkernels.ops.conv.geometry import Geometry

LINEAR = {
    "one position": (3, 1, 5, 4),
    "one of everything": (1, 1, 1, 1),
    "empty batch": (0, 3, 5, 4),
    "no positions": (2, 0, 5, 4),
    "odd": (3, 7, 13, 5),
    "one sample": (1, 9, 4, 6),
    "long, narrow": (2, 700, 3, 2),
    "short, wide": (2, 3, 65, 33),
    "several Gram tiles": (2, 300, 64, 70),
    "all but one tile": (3, 127, 70, 130),
    "one more than a tile": (2, 129, 17, 200),
}
"""(B, T, I, O)"""

REDUCTION = {
    "one position": (3, 4, 1, 2),
    "one of everything": (1, 1, 1, 1),
    "empty batch": (0, 4, 3, 2),
    "no positions": (2, 4, 0, 2),
    "odd": (3, 6, 7, 3),
    "a group per channel": (2, 5, 19, 5),
    "a vector and a bit": (2, 3, 65, 1),
    "several blocks": (2, 2, 5000, 2),
    "many channels": (2, 300, 70, 4),
}
"""(B, C, T, groups)"""

EMBEDDING = {
    "one position": (3, 1, 4, 5),
    "one index": (2, 9, 3, 1),
    "empty batch": (0, 4, 3, 5),
    "no positions": (2, 0, 3, 5),
    "duplicates": (3, 40, 5, 7),
    "mostly distinct": (2, 30, 1, 1000),
    "wide": (1, 12, 70, 4),
    "several blocks of columns": (3, 10, 2200, 6),
}
"""(B, T, D, V); the last is shared among threads"""

RECURRENCE = {
    "one of everything": ((1,), 1, 1),
    "one step": ((3,), 4, 5),
    "padded": ((3, 3, 3, 3), 6, 16),
    "packed": ((4, 3, 1, 1), 4, 5),
    "no two alike": ((5, 4, 3, 2, 1), 3, 8),
    "a vector and a bit": ((2, 2), 3, 17),
    "wide": ((2, 1, 1), 2, 150),
}
"""(samples per step, I, H)"""


@dataclass(frozen=True)
class Conv:
    """One convolution: arguments of F.conv*d for one batch, and how far the input overhangs."""

    batch: int
    channels_in: int
    channels_out: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    unused: int = 0
    """Trailing output positions of each axis that the layer never computed."""

    @property
    def weight_shape(self) -> list[int]:
        return [self.channels_out, self.channels_in // self.groups, *self.kernel]

    @property
    def output(self) -> list[int]:
        return [windows - self.unused for windows in self.geometry.windows(self.size)]

    @property
    def geometry(self) -> Geometry:
        shape = tuple(self.weight_shape)
        return Geometry(shape, self.stride, self.padding, self.dilation, self.groups)


CONV = {
    "1d": Conv(3, 4, 5, (19,), (3,), (1,), (1,), (1,)),
    "1d, one position": Conv(2, 3, 4, (3,), (3,), (1,), (0,), (1,)),
    "1d, long": Conv(2, 2, 3, (1500,), (5,), (1,), (2,), (1,)),
    "1d, strided and dilated": Conv(2, 4, 6, (23,), (3,), (3,), (2,), (2,), 2),
    "2d": Conv(2, 3, 4, (9, 11), (3, 3), (1, 1), (1, 1), (1, 1)),
    "2d, one tap": Conv(2, 6, 4, (5, 7), (1, 1), (1, 1), (0, 0), (1, 1), 2),
    "2d, one tap, strided": Conv(3, 4, 5, (7, 6), (1, 1), (2, 2), (0, 0), (1, 1)),
    "2d, one tap, strided, large": Conv(2, 7, 5, (33, 40), (1, 1), (2, 2), (0, 0), (1, 1)),
    "2d, one tap, padded": Conv(2, 3, 2, (4, 4), (1, 1), (1, 1), (1, 1), (1, 1)),
    "2d, stride 2, remainder": Conv(2, 5, 7, (10, 9), (3, 3), (2, 2), (1, 1), (1, 1)),
    "2d, stride larger than kernel": Conv(2, 3, 4, (11, 11), (2, 2), (3, 3), (0, 0), (1, 1)),
    "2d, mixed axes": Conv(2, 4, 6, (12, 7), (5, 2), (2, 1), (2, 0), (1, 3), 2),
    "2d, padding beyond the kernel": Conv(2, 2, 3, (5, 4), (2, 2), (1, 1), (3, 3), (1, 1)),
    "2d, dilated": Conv(2, 3, 4, (13, 12), (3, 3), (1, 1), (2, 2), (2, 2)),
    "2d, dilated and strided": Conv(2, 3, 4, (13, 12), (3, 3), (2, 2), (2, 2), (3, 3)),
    "2d, depthwise": Conv(2, 6, 6, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 6),
    "2d, depth multiplier": Conv(2, 4, 8, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 4),
    "2d, several blocks": Conv(1, 2, 5, (90, 70), (3, 3), (1, 1), (1, 1), (1, 1)),
    "2d, unused positions": Conv(2, 3, 4, (9, 9), (3, 3), (2, 2), (1, 1), (1, 1), 1, 1),
    "2d, unused and dilated": Conv(2, 3, 4, (12, 12), (3, 3), (1, 1), (2, 2), (2, 2), 1, 2),
    "3d": Conv(2, 3, 5, (5, 6, 7), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    "3d, one channel": Conv(2, 1, 1, (6, 6, 6), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    "3d, stride 2": Conv(2, 4, 6, (8, 8, 8), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "3d, patches": Conv(2, 3, 4, (8, 4, 6), (2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
    "3d, anisotropic": Conv(2, 3, 4, (4, 9, 9), (1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1)),
    "3d, one position": Conv(2, 3, 4, (3, 3, 3), (3, 3, 3), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
    "3d, several blocks": Conv(1, 17, 3, (9, 24, 26), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    "3d, grouped": Conv(2, 8, 12, (5, 5, 5), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 4),
    "empty batch": Conv(0, 3, 4, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    "one sample": Conv(1, 3, 4, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
}


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _expanded(tensor: torch.Tensor) -> torch.Tensor:
    """The first sample, seen B times through a stride of zero."""
    return tensor[:1].expand_as(tensor)


def _sliced(tensor: torch.Tensor) -> torch.Tensor:
    """Every second element of a larger tensor, in the last axis."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "channels last": _channels_last,
    "expanded": _expanded,
    "sliced": _sliced,
}
