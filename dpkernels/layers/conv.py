"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from dpkernels import ops
from dpkernels.layers.fold import sum_rows
from dpkernels.layers.operands import ConvOperand, Operand, StoredOperand
from dpkernels.layers.rule import Rule


def _batched(module: nn.Module, input: torch.Tensor) -> bool:
    return input.ndim == len(module.kernel_size) + 2


def _bias(backprops: torch.Tensor, samples: int) -> StoredOperand:
    return StoredOperand(sum_rows(ops.bias_grad_sample(backprops.flatten(2)), samples))


def _pad(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The input as the convolution saw it, and the symmetric zero padding still to be applied."""
    axes = x.ndim - 2
    if module.padding == "valid":
        return x, [0] * axes
    if module.padding_mode != "zeros":
        return F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), [
            0
        ] * axes
    if module.padding != "same":
        return x, list(module.padding)
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
    if all(t % 2 == 0 for t in total):
        return x, [t // 2 for t in total]
    return F.pad(x, module._reversed_padding_repeated_twice), [0] * axes


class ConvRule(Rule):
    """``nn.Conv1d/2d/3d`` on [rows, Cin, *spatial], every padding mode."""

    handles = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    methods = ("forward", "_conv_forward")
    sample_axis = 0

    def batched(self, module: nn.Module, input: torch.Tensor) -> bool:
        return _batched(module, input)

    def operands(
        self,
        module: nn.Module,
        activations: tuple[torch.Tensor, ...],
        backprops: torch.Tensor,
        samples: int,
        wanted: frozenset[str],
    ) -> Iterable[tuple[str, Operand]]:
        if "weight" in wanted:
            x, padding = _pad(module, activations[0].to(backprops.dtype))
            yield (
                "weight",
                ConvOperand(
                    x,
                    backprops,
                    list(module.weight.shape),
                    list(module.stride),
                    padding,
                    list(module.dilation),
                    module.groups,
                    samples,
                ),
            )
        if "bias" in wanted:
            yield "bias", _bias(backprops, samples)


class ConvTransposeRule(Rule):
    """``nn.ConvTranspose1d/2d/3d``: an ordinary convolution's weight gradient, operands swapped.

    The transposed convolution with weight [Cin, Cout/groups, *k] is the input gradient of a
    convolution from Cout to Cin channels with that very weight; its backprops play the
    convolution's input, its input plays the convolution's backprops.
    """

    handles = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    sample_axis = 0

    def batched(self, module: nn.Module, input: torch.Tensor) -> bool:
        return _batched(module, input)

    def operands(
        self,
        module: nn.Module,
        activations: tuple[torch.Tensor, ...],
        backprops: torch.Tensor,
        samples: int,
        wanted: frozenset[str],
    ) -> Iterable[tuple[str, Operand]]:
        if "weight" in wanted:
            yield (
                "weight",
                ConvOperand(
                    backprops,
                    activations[0].to(backprops.dtype),
                    list(module.weight.shape),
                    list(module.stride),
                    list(module.padding),
                    list(module.dilation),
                    module.groups,
                    samples,
                ),
            )
        if "bias" in wanted:
            yield "bias", _bias(backprops, samples)
