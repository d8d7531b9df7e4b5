"""MONAI's networks as they are, against one patient at a time, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.engine.truth import assert_private

nets = pytest.importorskip("monai.networks.nets")


def _unet(norm: object, **kwargs: object) -> nn.Module:
    return nets.UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        channels=(4, 8, 8),
        strides=(2, 2),
        num_res_units=1,
        norm=norm,
        **kwargs,
    )


def _dynunet(deep_supervision: bool) -> nn.Module:
    return nets.DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        kernel_size=[3, 3, 3, 3],
        strides=[1, 2, 2, 2],
        upsample_kernel_size=[2, 2, 2],
        filters=[4, 6, 8, 8],
        deep_supervision=deep_supervision,
        deep_supr_num=1,
    )


NETWORKS = {
    "UNet-INSTANCE": lambda: _unet("INSTANCE"),
    "UNet-GROUP": lambda: _unet(("GROUP", {"num_groups": 2})),
    "UNet-affine": lambda: _unet(("INSTANCE", {"affine": True})),
    "UNet-plain": lambda: nets.UNet(
        spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), bias=False
    ),
    "SegResNet": lambda: nets.SegResNet(
        spatial_dims=3,
        init_filters=8,
        in_channels=1,
        out_channels=2,
        blocks_down=(1, 1),
        blocks_up=(1,),
        norm=("GROUP", {"num_groups": 4}),
    ),
    "DynUNet": lambda: _dynunet(False),
    "DynUNet-deep": lambda: _dynunet(True),
    "BasicUNet": lambda: nets.BasicUNet(
        spatial_dims=3, in_channels=1, out_channels=2, features=(4, 4, 6, 6, 8, 4)
    ),
    "UNETR": lambda: nets.UNETR(
        in_channels=1,
        out_channels=2,
        img_size=(16, 16, 16),
        feature_size=4,
        hidden_size=24,
        mlp_dim=32,
        num_heads=4,
        dropout_rate=0.0,
    ),
    "MedNeXt": lambda: nets.MedNeXt(
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        init_filters=4,
        kernel_size=3,
        encoder_expansion_ratio=2,
        decoder_expansion_ratio=2,
        bottleneck_expansion_ratio=2,
        blocks_down=(1, 1),
        blocks_bottleneck=1,
        blocks_up=(1, 1),
    ),
    "SwinUNETR": lambda: nets.SwinUNETR(
        in_channels=1,
        out_channels=2,
        feature_size=12,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 2, 2),
        spatial_dims=2,
    ),
}
SHAPE = {"SwinUNETR": (64, 64), "BasicUNet": (32, 32, 32)}


def dice_loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Soft Dice per row with background, mean over rows; deep supervision heads all count."""
    image, label = batch
    output = model(image)
    heads = output.unbind(1) if output.ndim == image.ndim + 1 else (output,)
    losses = []
    for head in heads:
        probability = head.softmax(1)
        target = nn.functional.one_hot(label, 2).movedim(-1, 1).to(probability.dtype)
        axes = tuple(range(2, head.ndim))
        overlap = (probability * target).sum(axes)
        total = probability.sum(axes) + target.sum(axes)
        losses.append((1 - (2 * overlap + 1e-3) / (total + 1e-3)).mean(1))
    return torch.stack(losses).sum(0).mean()


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_clipped_gradients_equal_one_patient_at_a_time(name: str, views: int) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    shape = SHAPE.get(name, (16, 16, 16))
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3 * views, 1, *shape, generator=generator, dtype=torch.float64)
    image *= torch.linspace(0.5, 2.0, len(image)).double().reshape(-1, *[1] * (image.ndim - 1))
    label = (torch.rand(image.shape[0], *shape, generator=generator) < 0.3).long()
    assert_private(model, dice_loss, (image, label), views_per_sample=views)
