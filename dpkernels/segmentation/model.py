"""The network of a run, checked before training, and what its output looks like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dpkernels.training.targets import build_model

_DEFAULT_DIVISOR = 16


def build_network(
    block: dict[str, Any], *, in_channels: int, out_channels: int, seed: int
) -> nn.Module:
    """Build the network; channel counts come from the data unless the block states them.

    Args:
        block: `_target_` and keyword arguments.
        in_channels: number of modalities.
        out_channels: number of classes, background included.
        seed: of the initialisation; the global generator is left as it was.

    Raises:
        ValueError: the block cannot be built, or its channel counts are not the data's.
    """
    _check_group_norm(block, out_channels)
    return build_model(
        block, {"in_channels": in_channels, "out_channels": out_channels}, "dataset.json", seed
    )


def total_stride(block: dict[str, Any]) -> int:
    """The factor by which the network shrinks each axis; inputs are padded to multiples of it."""
    if "strides" in block:
        steps = [max(s) if isinstance(s, Sequence) else s for s in block["strides"]]
        return math.prod(steps)
    if "blocks_down" in block:
        return 2 ** (len(block["blocks_down"]) - 1)
    name = str(block["_target_"]).rpartition(".")[2]
    if name == "CentredUNet" and "channels" in block:
        return 2 ** (len(block["channels"]) - 1)
    return {"SwinUNETR": 32}.get(name, _DEFAULT_DIVISOR)


def head_outputs(output: Any) -> list[torch.Tensor]:
    """Deep-supervision heads, finest first: a list, a tuple, or DynUNet's stack [B, n, C, ...]."""
    if isinstance(output, (list, tuple)):
        return list(output)
    return list(output.unbind(1)) if output.dim() == 6 else [output]


def _check_group_norm(block: dict[str, Any], out_channels: int) -> None:
    norm = block.get("norm")
    if not str(block["_target_"]).endswith(".UNet") or not block.get("num_res_units"):
        return
    if not isinstance(norm, (list, tuple)) or str(norm[0]).lower() != "group":
        return
    groups = dict(norm[1]).get("num_groups", 1)
    if out_channels % groups:
        raise ValueError(
            f"network.norm: MONAI's UNet with num_res_units > 0 also normalises the class output, "
            f"so num_groups must divide the {out_channels} classes; got num_groups={groups}. "
            f"Use num_groups=1 or {out_channels}, norm=INSTANCE, or num_res_units=0"
        )
