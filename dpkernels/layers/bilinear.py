"""``nn.Bilinear``: a product of two inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dpkernels import ops
from dpkernels.layers.composite import CompositeRule, Found, Recorder, mark
from dpkernels.layers.fold import merge_positions, without_samples
from dpkernels.layers.operands import StoredOperand


class BilinearRule(CompositeRule):
    """``nn.Bilinear`` on [rows, *, I1] and [rows, *, I2]; weight [O, I1, I2]."""

    handles = (nn.Bilinear,)

    def knows(self, module: Any) -> bool:
        own = {name for name, p in module._parameters.items() if p is not None}
        return own <= {"weight", "bias"}

    def rows(self, module: Any, arguments: dict[str, Any]) -> int:
        first = arguments["input1"]
        if first.ndim < 2:
            raise without_samples("input1", first)
        return len(first)

    def run(self, module: Any, arguments: dict[str, Any], recorder: Recorder) -> torch.Tensor:
        first, second = arguments["input1"], arguments["input2"]
        weight, bias, samples = module.weight, module.bias, recorder.samples
        recorder.saw(first)
        recorder.saw(second)

        def operands(backprops: torch.Tensor, saved: Sequence[torch.Tensor]) -> Found:
            grad = merge_positions(backprops, samples)
            if recorder.wants(weight):
                one, two = (merge_positions(t, samples).to(grad.dtype) for t in saved)
                yield weight, StoredOperand(torch.einsum("bto,bti,btj->boij", grad, one, two))
            if recorder.wants(bias):
                yield bias, StoredOperand(ops.bias_last_grad_sample(grad))

        output = F.bilinear(first, second, weight.detach(), None if bias is None else bias.detach())
        return mark(recorder, output, operands, first, second)
