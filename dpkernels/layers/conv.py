"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from dpkernels import ops
from dpkernels.layers.fold import sum_rows
from dpkernels.layers.operands import ConvOperand, Operand, StoredOperand
from dpkernels.layers.rule import CapturedCall, Rule
from dpkernels.ops.conv.geometry import Geometry


def _pad(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The input as the convolution saw it, and the symmetric zero padding still to be applied."""
    none = [0] * (x.ndim - 2)
    if module.padding == "valid":
        return x, none
    if module.padding_mode != "zeros":
        return F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), none
    if module.padding != "same":
        return x, list(module.padding)
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
    if all(t % 2 == 0 for t in total):
        return x, [t // 2 for t in total]
    return F.pad(x, module._reversed_padding_repeated_twice), none


class ConvRule(Rule):
    """``nn.Conv1d/2d/3d`` on [rows, Cin, *spatial], every padding mode."""

    handles = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    methods = ("forward", "_conv_forward")
    sample_axis = 0

    def batched(self, module: nn.Module, input: torch.Tensor) -> bool:
        return input.ndim == len(module.kernel_size) + 2

    def factors(
        self, module: nn.Module, x: torch.Tensor, backprops: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Input, backprops, padding of a convolution with the same weight gradient as `module`."""
        x, padding = _pad(module, x)
        return x, backprops, padding

    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        module, backprops = call.module, call.backprops
        if "weight" in call.wanted:
            x = call.activations[0].to(backprops.dtype)
            input, grads, padding = self.factors(module, x, backprops)
            geometry = Geometry.of(
                module.weight.shape, module.stride, padding, module.dilation, module.groups
            )
            yield "weight", ConvOperand(input, grads, geometry, call.samples)
        if "bias" in call.wanted:
            bias = ops.bias_grad_sample(backprops.flatten(2))
            yield "bias", StoredOperand(sum_rows(bias, call.samples))


class ConvTransposeRule(ConvRule):
    """``nn.ConvTranspose1d/2d/3d``: an ordinary convolution's weight gradient, factors swapped.

    The transposed convolution with weight [Cin, Cout/groups, *k] is the input gradient of a
    convolution from Cout to Cin channels with the same weight. So the transposed convolution's
    backprops play the convolution's input, and its input plays the convolution's backprops.
    """

    handles = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    methods = Rule.methods

    def factors(
        self, module: nn.Module, x: torch.Tensor, backprops: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        return backprops, x, list(module.padding)
