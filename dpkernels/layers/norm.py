"""Normalisations that keep samples apart, and learned activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from dpkernels import ops
from dpkernels.layers.fold import merge_positions, sum_rows
from dpkernels.layers.operands import Operand, StoredOperand
from dpkernels.layers.rule import CapturedCall, ForEach, Rule


def _autocast(x: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


_INSTANCE_AXES = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}


class GroupNormRule(Rule):
    """``nn.GroupNorm`` and ``nn.InstanceNorm1d/2d/3d`` with affine parameters, [rows, C, *]."""

    handles = (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    sample_axis = 0

    def forward(
        self, module: nn.Module, input: torch.Tensor, run: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        if not isinstance(module, nn.GroupNorm) or not input.is_contiguous() or _autocast(input):
            return run(), (input,)
        rows, channels = input.shape[:2]
        positions = math.prod(input.shape[2:])
        output, *statistics = torch.native_group_norm(
            input,
            module.weight,
            module.bias,
            rows,
            channels,
            positions,
            module.num_groups,
            module.eps,
        )
        return output, (input, *statistics)

    def forward_each(
        self, module: nn.Module, input: torch.Tensor, for_each: ForEach
    ) -> torch.Tensor | None:
        """The library's own kernels, to which every row is a channel more of one sample.

        On their way to the input's gradient they form those of the weight and the bias.
        """
        rows, channels, *spatial = input.shape
        positions = math.prod(spatial)
        if input.device.type != "cpu" or not input.is_contiguous() or _autocast(input):
            return None
        if input.dtype.itemsize < 4 or input.numel() == 0 or positions == 1:
            return None
        tensors = (getattr(module, name) for name in ("weight", "bias"))
        if any(t is not None and t.dtype != input.dtype for t in tensors):
            return None
        weight, bias = (
            None if getattr(module, name) is None else for_each(name, rows).reshape(-1)
            for name in ("weight", "bias")
        )
        one = input.view(1, rows * channels, *spatial)
        if isinstance(module, nn.GroupNorm):
            sizes = (1, rows * channels, positions, rows * module.num_groups, module.eps)
            output = torch.native_group_norm(one, weight, bias, *sizes)[0]
        else:
            no_statistics = (None, None, True, 0.0)
            output = torch.native_batch_norm(one, weight, bias, *no_statistics, module.eps)[0]
        return output.view(input.shape)

    def batched(self, module: nn.Module, input: torch.Tensor) -> bool:
        axes = (a for kind, a in _INSTANCE_AXES.items() if isinstance(module, kind))
        return input.ndim == next(axes, input.ndim) and input.ndim >= 2

    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        grad = call.backprops
        grad = grad.flatten(2) if grad.ndim > 2 else grad.unsqueeze(2)
        if "weight" not in call.wanted:
            yield "bias", StoredOperand(sum_rows(ops.bias_grad_sample(grad), call.samples))
            return
        x, *statistics = call.activations
        rows, channels = x.shape[:2]
        x = x.reshape(rows, channels, -1)
        if not statistics:
            groups = getattr(call.module, "num_groups", channels)
            statistics = ops.normalization_statistics(x, groups, call.module.eps)
        mean, rstd = statistics
        weight, bias = ops.normalization_grad_sample(x, grad, mean, rstd)
        yield "weight", StoredOperand(sum_rows(weight, call.samples))
        if "bias" in call.wanted:
            yield "bias", StoredOperand(sum_rows(bias, call.samples))


class LayerNormRule(Rule):
    """``nn.LayerNorm`` (with or without bias) and ``nn.RMSNorm``, [rows, *, *normalized_shape]."""

    handles = (nn.LayerNorm, nn.RMSNorm)

    def forward(
        self, module: nn.Module, input: torch.Tensor, run: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        if not isinstance(module, nn.LayerNorm) or _autocast(input):
            return run(), (input,)
        shape = list(module.normalized_shape)
        output, *statistics = torch.native_layer_norm(
            input, shape, module.weight, module.bias, module.eps
        )
        return output, (input, *statistics)

    def batched(self, module: nn.Module, input: torch.Tensor) -> bool:
        return input.ndim > len(module.normalized_shape)

    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        module, samples = call.module, call.samples
        shape = tuple(module.normalized_shape)
        grad = merge_positions(call.backprops.flatten(-len(shape)), samples)
        grad = grad if grad.dtype.itemsize > 2 else grad.float()
        if "weight" not in call.wanted:
            bias = ops.bias_last_grad_sample(grad)
            yield "bias", StoredOperand(bias.reshape(samples, *shape))
            return
        x, *statistics = call.activations
        x = merge_positions(x.flatten(-len(shape)), samples)
        if isinstance(module, nn.RMSNorm):
            x = x.to(grad.dtype)
            eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
            normalized = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            weight = ops.affine_last_grad_sample(normalized, grad)
            yield "weight", StoredOperand(weight.reshape(samples, *shape))
            return
        if not statistics:
            statistics = ops.normalization_statistics(x.reshape(-1, 1, x.shape[-1]), 1, module.eps)
        mean, rstd = (s.reshape(samples, -1) for s in statistics)
        weight, bias = ops.normalization_last_grad_sample(x, grad, mean, rstd)
        yield "weight", StoredOperand(weight.reshape(samples, *shape))
        if "bias" in call.wanted:
            yield "bias", StoredOperand(bias.reshape(samples, *shape))


class PReLURule(Rule):
    """``nn.PReLU`` with one slope or one per channel, [rows, C, *]."""

    handles = (nn.PReLU,)
    parameters = ("weight",)

    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        x, grad = call.activations[0], call.backprops
        x = x.reshape(len(x), call.module.num_parameters, -1).clamp(max=0)
        slope = ops.affine_grad_sample(x.to(grad.dtype), grad.reshape(x.shape))
        yield "weight", StoredOperand(sum_rows(slope, call.samples))
