"""Embedding tables."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dpkernels.layers.fold import merge_positions
from dpkernels.layers.operands import EmbeddingOperand, Operand
from dpkernels.layers.rule import CapturedCall, Rule


def table_refusal(module: nn.Module) -> str | None:
    """Why an embedding table has no per-sample gradients; None if there is no reason."""
    if module.max_norm is not None:
        return "max_norm rescales the table in place from private indices; use max_norm=None"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq counts over the whole batch; use scale_grad_by_freq=False"
    return None


class EmbeddingRule(Rule):
    """``nn.Embedding`` on indices [rows, *]."""

    handles = (nn.Embedding,)
    parameters = ("weight",)

    def batched(self, module: nn.Module, input: torch.Tensor) -> bool:
        return input.ndim >= 1

    def refusal(self, module: nn.Module) -> str | None:
        return table_refusal(module)

    def operands(self, call: CapturedCall) -> Iterable[tuple[str, Operand]]:
        padding_idx = call.module.padding_idx
        operand = EmbeddingOperand(
            call.activations[0].reshape(call.samples, -1).long(),
            merge_positions(call.backprops, call.samples),
            call.module.num_embeddings,
            -1 if padding_idx is None else padding_idx,
        )
        yield "weight", operand
