"""``nn.MultiheadAttention``: its projections are linear layers, the rest has no parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dpkernels.layers.composite import CompositeRule, Part, Recorder, linear
from dpkernels.layers.fold import without_samples


class AttentionRule(CompositeRule):
    """``nn.MultiheadAttention`` without ``add_bias_kv`` and ``add_zero_attn``.

    The forward is that of ``F.multi_head_attention_forward`` with both projections captured.
    """

    handles = (nn.MultiheadAttention,)

    def knows(self, module: Any) -> bool:
        return (
            module.bias_k is None
            and module.bias_v is None
            and not module.add_zero_attn
            and isinstance(module.out_proj, nn.Linear)
            and set(module._modules) == {"out_proj"}
        )

    def rows(self, module: Any, arguments: dict[str, Any]) -> int:
        for name in ("query", "key", "value"):
            if arguments[name].ndim != 3:
                raise without_samples(name, arguments[name])
        return arguments["query"].shape[0 if module.batch_first else 1]

    def run(
        self, module: Any, arguments: dict[str, Any], recorder: Recorder
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        axis = 0 if module.batch_first else 1
        tensors = [arguments[name] for name in ("query", "key", "value")]
        for tensor in {id(t): t for t in tensors}.values():
            recorder.saw(tensor.movedim(axis, 0))
        heads = [
            _split_heads(t, module.num_heads, axis)
            for t in _projected(module, tensors, recorder, axis)
        ]
        output, weights = _attend(module, heads, arguments)
        output = output.transpose(1, 2).flatten(2)
        output = output if axis == 0 else output.transpose(0, 1).contiguous()
        weight, bias = module.out_proj.weight, module.out_proj.bias
        output = linear(recorder, output, Part(weight), None if bias is None else Part(bias), axis)
        if weights is not None and arguments.get("average_attn_weights", True):
            weights = weights.mean(1)
        return output, weights


def _projected(
    module: Any, tensors: list[torch.Tensor], recorder: Recorder, axis: int
) -> list[torch.Tensor]:
    """Query, key and value after their projections: one product for what is the same tensor."""
    width, bias = module.embed_dim, module.in_proj_bias

    def project(x: torch.Tensor, weight: Part, first: int, count: int) -> torch.Tensor:
        part = None if bias is None else Part(bias, first * width, count * width)
        return linear(recorder, x, weight, part, axis)

    if not module._qkv_same_embed_dim:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        return [project(t, Part(w), i, 1) for i, (t, w) in enumerate(zip(tensors, weights))]
    query, key, value = tensors
    if key is not value:
        groups = [(t, 1) for t in tensors]
    else:
        groups = [(query, 3)] if query is key else [(query, 1), (key, 2)]
    found: list[torch.Tensor] = []
    for tensor, count in groups:
        first = len(found)
        weight = Part(module.in_proj_weight, first * width, count * width)
        found.extend(project(tensor, weight, first, count).chunk(count, -1))
    return found


def _split_heads(x: torch.Tensor, heads: int, axis: int) -> torch.Tensor:
    """[.., .., heads * D] with the sample axis at `axis` -> [rows, heads, T, D]."""
    return x.movedim(axis, 0).unflatten(2, (heads, -1)).transpose(1, 2)


def _attend(
    module: Any, heads: list[torch.Tensor], arguments: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[rows, heads, T, D], and the weights [rows, heads, T, S] if they are wanted."""
    query, key, value = heads
    dropout = module.dropout if module.training else 0.0
    attn_mask, padding = arguments.get("attn_mask"), arguments.get("key_padding_mask")
    causal = arguments.get("is_causal", False)
    if causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint")
    wanted = arguments.get("need_weights", True)
    causal = causal and padding is None and not wanted
    mask = None if causal else _mask(attn_mask, padding, query, key)
    if not wanted:
        attended = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal)
        return attended, None
    scores = query * math.sqrt(1.0 / query.shape[-1]) @ key.transpose(-2, -1)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights @ value, weights


def _mask(
    attn_mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
) -> torch.Tensor | None:
    """What is added to the scores, broadcasting to [rows, heads, T, S]."""
    rows, heads, length = query.shape[:3]
    if attn_mask is not None:
        attn_mask = _additive(attn_mask, query.dtype)
        if attn_mask.ndim == 3:
            attn_mask = attn_mask.reshape(rows, heads, length, key.shape[2])
    if padding is None:
        return attn_mask
    padding = _additive(padding, query.dtype).reshape(rows, 1, 1, key.shape[2])
    return padding if attn_mask is None else attn_mask + padding


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask (True: left out) as 0 and -inf; another one as it is."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
