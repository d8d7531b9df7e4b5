"""What users of Opacus and BackPACK change in a network that hooks or ExpandedWeights cannot take.

The function computed stays the same, and so do the parameters; the ordinary step, the per-sample
loop and ours run the network as its authors wrote it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from torch import nn

from bench.models import PositionEmbedding


def hookable(model: nn.Module) -> nn.Module:
    """`model`, changed so that full backward hooks work.

    A hook makes of a module's output a view, which nothing may change in place: activations work
    out of place, and so does MONAI's residual sum. Opacus visits a module once per name and hooks
    it as often: the second names of MONAI's DynUNet, which its forward does not use, go.
    """
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    if importlib.util.find_spec("monai") is not None:
        _monai_hookable(model)
    return model


def without_bare_parameters(model: nn.Module) -> nn.Module:
    """`model` with positions from ``nn.Embedding``: ExpandedWeights know layers' functions only."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, PositionEmbedding):
                setattr(parent, name, _LookedUpPositions(child.weight))
    return model


class _LookedUpPositions(nn.Embedding):
    """:class:`PositionEmbedding` as a table of which every sample looks up all rows."""

    def __init__(self, positions: torch.Tensor):
        super().__init__(*positions.shape[1:], _weight=positions.detach()[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, d] -> [B, T, d]."""
        ids = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        return x + super().forward(ids)


def _monai_hookable(model: nn.Module) -> None:
    from monai.networks.blocks.segresnet_block import ResBlock
    from monai.networks.nets import DynUNet

    class OutOfPlace(ResBlock):
        """The block with its residual sum out of place."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Features of the same shape."""
            inner = self.conv1(self.act(self.norm1(x)))
            return self.conv2(self.act(self.norm2(inner))) + x

    for module in list(model.modules()):
        if type(module) is ResBlock:
            module.__class__ = OutOfPlace
        if isinstance(module, DynUNet):
            for name in _second_names(module):
                delattr(module, name)


def _second_names(network: nn.Module) -> Iterator[str]:
    """Children of a DynUNet all of whose modules its ``skip_layers`` hold too."""
    used = set(network.skip_layers.modules())
    for name, child in list(network.named_children()):
        own = {m for m in child.modules() if not isinstance(m, nn.ModuleList)}
        if name != "skip_layers" and own <= used:
            yield name
