"""The shape of a convolution, as the CPU strategies pass it around."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Geometry:
    """Attributes as the arguments of `conv_grad_sample`, one entry per spatial axis."""

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
        """From an op's arguments."""
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


def native_sizes(
    input: torch.Tensor, grad_output: torch.Tensor, geometry: Geometry
) -> tuple[tuple[int, ...], ...]:
    """What the compiled kernels take: counts, then six sizes on the three axes that they know.

    Returns:
        (batch, channels in, channels out, groups), input, output, kernel, stride, padding,
        dilation.
    """
    return (
        (input.shape[0], input.shape[1], grad_output.shape[1], geometry.groups),
        _three(input.shape[2:], 1),
        _three(grad_output.shape[2:], 1),
        _three(geometry.kernel, 1),
        _three(geometry.stride, 1),
        _three(geometry.padding, 0),
        _three(geometry.dilation, 1),
    )


def native_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of samples, channels and the three axes, in elements."""
    sample, channel, *spatial = tensor.stride()
    return (sample, channel, *_three(tuple(spatial), 0))


def _three(values: tuple[int, ...], missing: int) -> tuple[int, ...]:
    return (*[missing] * (3 - len(values)), *values)
