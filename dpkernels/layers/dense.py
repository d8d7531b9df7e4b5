"""Linear layers and embeddings."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dpkernels import ops
from dpkernels.layers.fold import merge_rows
from dpkernels.layers.operands import EmbeddingOperand, LinearOperand, Operand, StoredOperand
from dpkernels.layers.rule import Rule


class LinearRule(Rule):
    """``nn.Linear`` on [rows, *, I]; every axis between the first and the last is a position."""

    handles = (nn.Linear,)

    def operands(
        self,
        module: nn.Module,
        activations: tuple[torch.Tensor, ...],
        backprops: torch.Tensor,
        samples: int,
        wanted: frozenset[str],
    ) -> Iterable[tuple[str, Operand]]:
        grad = merge_rows(backprops.reshape(len(backprops), -1, backprops.shape[-1]), samples)
        if "weight" in wanted:
            (x,) = activations
            x = merge_rows(x.reshape(len(x), -1, x.shape[-1]), samples)
            yield "weight", LinearOperand(x.to(grad.dtype), grad)
        if "bias" in wanted:
            yield "bias", StoredOperand(ops.bias_last_grad_sample(grad))


class EmbeddingRule(Rule):
    """``nn.Embedding`` on indices [rows, *]."""

    handles = (nn.Embedding,)
    parameters = ("weight",)

    def batched(self, module: nn.Module, input: torch.Tensor) -> bool:
        return input.ndim >= 1

    def refusal(self, module: nn.Module) -> str | None:
        if module.max_norm is not None:
            return "max_norm rescales the table in place from private indices; use max_norm=None"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq counts over the whole batch; use scale_grad_by_freq=False"
        return None

    def operands(
        self,
        module: nn.Module,
        activations: tuple[torch.Tensor, ...],
        backprops: torch.Tensor,
        samples: int,
        wanted: frozenset[str],
    ) -> Iterable[tuple[str, Operand]]:
        (indices,) = activations
        padding_idx = -1 if module.padding_idx is None else module.padding_idx
        yield (
            "weight",
            EmbeddingOperand(
                indices.reshape(samples, -1).long(),
                backprops.reshape(samples, -1, backprops.shape[-1]),
                module.num_embeddings,
                padding_idx,
            ),
        )
