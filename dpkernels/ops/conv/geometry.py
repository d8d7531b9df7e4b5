"""The shape of a convolution, as contracts, implementations and layers pass it around."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Geometry(NamedTuple):
    """One entry per spatial axis; flat, the last five arguments of ``conv_grad_sample``."""

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls,
        weight_shape: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Geometry:
        """From an op's flat arguments."""
        return cls(tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.stride)

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return torch.Size(self.weight_shape).numel()

    @property
    def channels(self) -> tuple[int, int]:
        """Input and output channels of one group."""
        return self.weight_shape[1], self.weight_shape[0] // self.groups

    def windows(self, input: tuple[int, ...]) -> list[int]:
        """The number of positions of the window on each axis of an input with these sizes."""
        each = zip(input, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in each]


@functools.lru_cache(maxsize=4096)
def check_sizes(input: tuple[int, ...], grad_output: tuple[int, ...], geometry: Geometry) -> None:
    """Raise ``ValueError`` unless the sizes fit; a network repeats the same ones in every step."""
    axes = len(geometry.weight_shape) - 2
    for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        values = getattr(geometry, name)
        if len(values) != axes or min(values) < least:
            raise ValueError(f"{name}={list(values)}: expected {axes} integers >= {least}")
    channels_out, channels_in = geometry.weight_shape[:2]
    groups = geometry.groups
    if groups < 1 or channels_out % groups:
        raise ValueError(f"groups={groups}: expected a divisor of weight_shape[0]={channels_out}")
    if input[1] != channels_in * groups:
        raise ValueError(
            f"input: {input[1]} channels, expected weight_shape[1] * groups ="
            f" {channels_in * groups}"
        )
    if grad_output[:2] != (input[0], channels_out):
        raise ValueError(
            f"grad_output: shape {list(grad_output)}, expected [{input[0]}, {channels_out}, ...]"
        )
    for axis, most in enumerate(geometry.windows(input[2:])):
        if grad_output[2 + axis] > max(most, 0):
            raise ValueError(
                f"grad_output: shape {list(grad_output)} has more positions on spatial axis"
                f" {axis} than input {list(input)} has windows ({most})"
            )


def native_geometry(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> tuple[int | tuple[int, ...], ...]:
    """What the compiled kernels take: the members of ``ConvGeometry`` (csrc), on three axes."""
    return (
        input.shape[0],
        input.shape[1],
        grad_output.shape[1],
        geometry.groups,
        _three(input.shape[2:], 1),
        _three(grad_output.shape[2:], 1),
        _three(geometry.kernel, 1),
        _three(geometry.stride, 1),
        _three(geometry.padding, 0),
        _three(geometry.dilation, 1),
        (*input.stride()[:2], *_three(input.stride()[2:], 0)),
        (*grad_output.stride()[:2], *_three(grad_output.stride()[2:], 0)),
    )


def _three(values: tuple[int, ...], missing: int) -> tuple[int, ...]:
    return (*[missing] * (3 - len(values)), *values)
