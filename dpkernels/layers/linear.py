"""Linear layers, and GPT-2's linear layer with a transposed weight."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dpkernels import ops
from dpkernels.layers.fold import merge_positions
from dpkernels.layers.operands import LinearOperand, Operand, StoredOperand
from dpkernels.layers.rule import CapturedCall, Rule


class LinearRule(Rule):
    """``nn.Linear`` on [rows, *, I]; every axis between the first and the last is a position."""

    handles = (nn.Linear,)

    def product(self, x: torch.Tensor, grad: torch.Tensor) -> LinearOperand:
        """The weight's operand, from activations and backprops [samples, T, *]."""
        return LinearOperand(x, grad)

    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        grad = merge_positions(call.backprops, call.samples)
        if "weight" in call.wanted:
            x = merge_positions(call.activations[0], call.samples)
            yield "weight", self.product(x.to(grad.dtype), grad)
        if "bias" in call.wanted:
            yield "bias", StoredOperand(ops.bias_last_grad_sample(grad))


class TransposedLinearRule(LinearRule):
    """``transformers.pytorch_utils.Conv1D`` (GPT-2): a Linear layer with weight [I, O].

    Recognised by the full name of its class, so that `transformers` need not be installed.
    """

    handles = ()

    def applies(self, module: nn.Module) -> bool:
        cls = type(module)
        return (
            f"{cls.__module__}.{cls.__qualname__}" == "transformers.pytorch_utils.Conv1D"
            and "forward" not in module.__dict__
            and set(module._parameters) == {"weight", "bias"}
            and not module._modules
        )

    def product(self, x: torch.Tensor, grad: torch.Tensor) -> LinearOperand:
        return LinearOperand(grad, x)
