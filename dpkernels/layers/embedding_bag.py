"""``nn.EmbeddingBag``: a captured embedding, and a reduction over each bag left to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dpkernels.layers.composite import CompositeRule, Found, Recorder, mark
from dpkernels.layers.embedding import table_refusal
from dpkernels.layers.fold import merge_positions
from dpkernels.layers.operands import EmbeddingOperand


class EmbeddingBagRule(CompositeRule):
    """``nn.EmbeddingBag``: bags as [rows, length], or flat with offsets; every mode."""

    handles = (nn.EmbeddingBag,)

    def knows(self, module: Any) -> bool:
        return [n for n, p in module._parameters.items() if p is not None] == ["weight"]

    def refusal(self, module: Any) -> str | None:
        return table_refusal(module)

    def rows(self, module: Any, arguments: dict[str, Any]) -> int:
        offsets = arguments.get("offsets")
        if offsets is not None:
            return len(offsets) - int(module.include_last_offset)
        return len(arguments["input"])

    def run(self, module: Any, arguments: dict[str, Any], recorder: Recorder) -> torch.Tensor:
        indices, weights = arguments["input"], arguments.get("per_sample_weights")
        offsets = arguments.get("offsets")
        if weights is not None and module.mode != "sum":
            raise NotImplementedError("per_sample_weights: only mode='sum' takes them")
        if offsets is None:
            held = torch.ones_like(indices, dtype=torch.bool)
        else:
            rows = self.rows(module, arguments)
            if rows != recorder.samples:
                raise ValueError(
                    f"nn.EmbeddingBag: {rows} bags for {recorder.samples} samples. Where flat "
                    "indices are an input of the model its batch size is unknown: pad them to "
                    "[batch, length] and state padding_idx"
                )
            indices, weights, held = _padded(indices, offsets[:rows], weights)
        padding_idx = module.padding_idx
        if padding_idx is not None:
            held = held & (indices != padding_idx)
        recorder.saw(indices)
        vectors = self._embed(module, indices, held, recorder)
        return _reduced(vectors, held, weights, module.mode)

    def _embed(
        self, module: Any, indices: torch.Tensor, held: torch.Tensor, recorder: Recorder
    ) -> torch.Tensor:
        """[rows, length, D]: the embedding vectors, captured."""

        def operands(backprops: torch.Tensor, saved: Sequence[torch.Tensor]) -> Found:
            indices, held = saved
            operand = EmbeddingOperand(
                indices.reshape(recorder.samples, -1).long(),
                merge_positions(backprops * held.unsqueeze(-1), recorder.samples),
                module.num_embeddings,
                -1,
            )
            yield module.weight, operand

        return mark(recorder, F.embedding(indices, module.weight.detach()), operands, indices, held)


def _padded(
    flat: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """[rows, longest bag] each: indices; weights or None; whether a position lies in its bag."""
    ends = torch.cat([offsets[1:], offsets.new_tensor([len(flat)])])
    lengths = ends - offsets
    if int(offsets[0]) != 0 or bool((lengths < 0).any()):
        raise RuntimeError("nn.EmbeddingBag: expected offsets that start at 0 and never decrease")
    places = torch.arange(max(int(lengths.max()), 1), device=flat.device)
    held = places < lengths.unsqueeze(1)
    at = (offsets.unsqueeze(1) + places).clamp(max=max(len(flat) - 1, 0))
    if not len(flat):
        return torch.zeros_like(at), None, held
    return flat[at].where(held, 0), None if weights is None else weights[at], held


def _reduced(
    vectors: torch.Tensor, held: torch.Tensor, weights: torch.Tensor | None, mode: str
) -> torch.Tensor:
    """[rows, length, D] -> [rows, D]: reduce each bag where `held` is true; 0 for an empty bag."""
    held = held.unsqueeze(-1)
    if mode == "max":
        highest = vectors.masked_fill(~held, -torch.inf).max(1).values
        return highest.where(held.any(1), 0.0)
    if weights is not None:
        vectors = vectors * weights.unsqueeze(-1)
    total = vectors.where(held, 0.0).sum(1)
    return total if mode == "sum" else total / held.sum(1).clamp(min=1)
