"""Attention, recurrent layers and bags: where their arguments carry the samples.

These modules say themselves whether their sample axis is the first (``batch_first``), whatever the
model around them does; masks and hidden states have axes of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from opacus.layers.dp_rnn import DPRNNBase
from torch import nn

from dpkernels.layers.fold import without_samples

_BATCH_FIRST: tuple[tuple[tuple[type[nn.Module], ...], Callable[[Any], bool]], ...] = (
    ((nn.MultiheadAttention, nn.RNNBase, DPRNNBase, nn.Transformer), lambda m: m.batch_first),
    ((nn.TransformerEncoderLayer, nn.TransformerDecoderLayer), lambda m: m.self_attn.batch_first),
    (
        (nn.TransformerEncoder, nn.TransformerDecoder),
        lambda m: m.layers[0].self_attn.batch_first,
    ),
)


def stated_axis(module: nn.Module) -> int | None:
    """The sample axis that the module itself states for what is below it; None if it does not."""
    for kinds, batch_first in _BATCH_FIRST:
        if isinstance(module, kinds):
            return 0 if batch_first(module) else 1
    return None


def arguments_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of the module, by the names that its class gives them."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    return dict(list(bound.arguments.items())[1:])


def _attention(module: Any, axis: int, name: str, tensor: torch.Tensor) -> int | None:
    if name in ("query", "key", "value"):
        if tensor.ndim != 3:
            raise without_samples(name, tensor)
        return axis
    if name == "key_padding_mask" or (name == "attn_mask" and tensor.ndim == 3):
        return 0
    return None


def _recurrent(module: Any, axis: int, name: str, tensor: torch.Tensor) -> int | None:
    if tensor.ndim != 3:
        raise without_samples(name, tensor)
    return axis if name == "input" else 1


def _bag(module: Any, axis: int, name: str, tensor: torch.Tensor) -> int | None:
    if name == "offsets" or tensor.ndim != 2:
        raise ValueError(
            "with offsets its samples have different lengths; pad the indices to [batch, length] "
            "and state padding_idx"
        )
    return 0


_ARGUMENTS: tuple[tuple[type[nn.Module], Callable[[Any, int, str, torch.Tensor], int | None]], ...]
_ARGUMENTS = (
    (nn.MultiheadAttention, _attention),
    (nn.RNNBase, _recurrent),
    (nn.EmbeddingBag, _bag),
)


def sample_axes(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int
) -> tuple[dict[str, Any], Callable[[str, torch.Tensor], int | None]] | None:
    """How a module of this file is called by keywords, and the sample axis of each tensor.

    Args:
        module: any module.
        args: its positional arguments.
        kwargs: its keyword arguments.
        axis: the sample axis of its main input.

    Returns:
        All arguments by name, and a function of argument name and tensor that returns the tensor's
        sample axis (None: the tensor is the same for every sample); None for other modules.

    Raises:
        ValueError: the arguments have no sample axis.
    """
    for kind, axis_of in _ARGUMENTS:
        if isinstance(module, kind) and type(module).forward is _base_forward(module):
            return arguments_of(module, args, kwargs), partial(axis_of, module, axis)
    return None


def _base_forward(module: nn.Module) -> Any:
    """The forward that PyTorch itself defines for the module's kind."""
    return next(
        c.forward
        for c in type(module).__mro__
        if issubclass(c, nn.Module) and c.__module__.startswith("torch.nn.modules")
    )
