"""What is measured: a network, a batch, a precision. One place to add a case."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from bench import models, table

_SEED = 20
Batch = tuple[torch.Tensor, torch.Tensor]


class SampleCrossEntropy(nn.Module):
    """Cross-entropy as a mean over samples; ``reduction="none"`` gives one value per sample, [B].

    Opacus' ghost mode sets ``reduction`` to ``"none"`` and averages over axis 0 only, so the
    voxels or tokens of one sample have to be averaged here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reduction = "mean"

    def forward(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """[] or [B] for scores [B, classes, ...] and target [B, ...]."""
        if self.reduction == "mean":
            return nn.functional.cross_entropy(scores, target)
        loss = nn.functional.cross_entropy(scores, target, reduction="none")
        return loss.flatten(1).mean(dim=1) if loss.ndim > 1 else loss


@dataclass(frozen=True)
class Case:
    """One training step to be measured.

    Attributes:
        name: key of its rows, e.g. ``unet3d-48-b2``.
        title: for tables.
        suite: the run it belongs to: ``cpu``, ``quick``, ``gpu``, or none (empty).
        make_model: builds the network.
        make_batch: (generator) -> (input, target), the batch first.
        precision: ``float32``, or ``bfloat16`` by autocast with float32 weights.
        leave_out: rivals that a smaller case has shown to be far slower, to save minutes; they
            are measured too where the plan says everyone.
    """

    name: str
    title: str
    suite: str
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[torch.Generator], Batch]
    precision: str = "float32"
    leave_out: tuple[str, ...] = ()

    def build(self, device: torch.device) -> Workload:
        """The network with fixed initial weights and the fixed batch, on `device`."""
        torch.manual_seed(_SEED)
        model = self.make_model().train().to(device)
        inputs, target = self.make_batch(torch.Generator().manual_seed(_SEED))
        return Workload(self, model, inputs.to(device), target.to(device))


@dataclass(frozen=True)
class Workload:
    """A case on a device: the network and one batch."""

    case: Case
    model: nn.Module
    inputs: torch.Tensor
    target: torch.Tensor

    @property
    def batch_size(self) -> int:
        """Number of samples."""
        return len(self.inputs)

    def parameters(self) -> int:
        """Number of trained numbers."""
        return sum(p.numel() for p in self.model.parameters())

    def autocast(self) -> torch.autocast:
        """The context of the forward pass."""
        enabled = self.case.precision == "bfloat16"
        return torch.autocast(self.inputs.device.type, torch.bfloat16, enabled=enabled)

    def loss(self, model: nn.Module, criterion: nn.Module) -> torch.Tensor:
        """Of `model` on the batch, in the precision of the case."""
        with self.autocast():
            return criterion(model(self.inputs), self.target)

    def samples(self) -> list[Workload]:
        """The same work, one sample at a time."""
        pairs = zip(self.inputs.split(1), self.target.split(1), strict=True)
        return [replace(self, inputs=inputs, target=target) for inputs, target in pairs]

    def fresh_model(self) -> nn.Module:
        """A copy with the initial weights."""
        return copy.deepcopy(self.model)

    def in_precision(self, dtype: torch.dtype) -> Workload:
        """The same work in `dtype` throughout, without autocast: for the ground truth."""
        case = replace(self.case, precision="float32")
        inputs = self.inputs.to(dtype) if self.inputs.is_floating_point() else self.inputs
        return Workload(case, self.fresh_model().to(dtype), inputs, self.target)


def volumes(side: int, batch: int, generator: torch.Generator) -> Batch:
    """One channel, [B, 1, X, Y, Z], and two classes a voxel."""
    shape = (batch, side, side, side)
    image = torch.randn(batch, 1, side, side, side, generator=generator)
    return image, torch.randint(2, shape, generator=generator)


def labelled(shape: tuple[int, ...], classes: int, batch: int, generator: torch.Generator) -> Batch:
    """Standard normals, [B, *shape], and one of `classes` for each sample."""
    inputs = torch.randn(batch, *shape, generator=generator)
    return inputs, torch.randint(classes, (batch,), generator=generator)


def tokens(vocabulary: int, length: int, batch: int, generator: torch.Generator) -> Batch:
    """Ids [B, T], and those of the next positions, [B, T]."""
    ids = torch.randint(vocabulary, (batch, length + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _labelled_tokens(vocabulary: int, length: int, batch: int, generator: torch.Generator) -> Batch:
    ids = torch.randint(vocabulary, (batch, length), generator=generator)
    return ids, torch.randint(2, (batch,), generator=generator)


def few_fields(rows: int, fields: int, batch: int, generator: torch.Generator) -> Batch:
    """One row of the table per field and sample: ids [B, fields], two classes."""
    ids, target = _labelled_tokens(rows // fields, fields, batch, generator)
    return ids + torch.arange(fields) * (rows // fields), target


def unet(
    side: int, batch: int, suite: str = "", precision: str = "float32", base: int = 24
) -> Case:
    """A 3D U-Net on volumes of `side` voxels a side."""
    return Case(
        f"unet3d-{side}-b{batch}" + ("" if base == 24 else f"-c{base}"),
        f"3D U-Net {'0.76 M' if base == 24 else f'base {base}'}, {side}³, B={batch}",
        suite,
        partial(models.UNet3d, base),
        partial(volumes, side, batch),
        precision,
    )


def encoder(
    length: int, width: int, depth: int, batch: int, suite: str = "", precision: str = "float32"
) -> Case:
    """A transformer encoder of `depth` blocks on `length` positions."""
    return Case(
        f"encoder-t{length}-d{width}-b{batch}",
        f"transformer encoder, T={length}, d={width}, B={batch}",
        suite,
        partial(models.Encoder, width, depth, max(width // 64, 1)),
        partial(labelled, (length, width), 10, batch),
        precision,
    )


def monai(network: str, side: int, batch: int, about: str = "", **options: Any) -> Case:
    """A network of MONAI on volumes of `side` voxels a side; `options` are the network's."""
    return Case(
        f"monai-{network.lower()}-{side}-b{batch}",
        f"MONAI {network}{about}, {side}³, B={batch}",
        "cpu",
        partial(models.of_monai, network, **options),
        partial(volumes, side, batch),
        leave_out=_FAR_SLOWER_ON_VOLUMES,
    )


def resnet(
    kind: str, side: int, batch: int, suite: str, blocks: tuple[int, ...], **options: Any
) -> Case:
    """A network of residual blocks on images of `side` pixels a side; `options` are the model's."""
    on_gpu = suite == "gpu"
    classes = 1000 if on_gpu else 10
    small = kind == "-small"
    return Case(
        f"resnet{kind}-{side}-b{batch}",
        f"ResNet{_SMALL if small else f'-{kind} (GroupNorm)'}, {side}², B={batch}",
        suite,
        partial(models.ResNet, blocks, classes=classes, large_images=on_gpu, **options),
        partial(labelled, (3, side, side), classes, batch),
        "bfloat16" if on_gpu else "float32",
        () if small or on_gpu else ("hooks", "ghost", "functorch", "ew"),
    )


def recommender(rows: int, width: int, hidden: tuple[int, int], batch: int, suite: str) -> Case:
    """An embedding table for sixteen fields, and an MLP."""
    return Case(
        f"recommender-b{batch}",
        f"embedding {rows:,} x {width} + MLP, B={batch}",
        suite,
        partial(models.Recommender, rows, 16, width, hidden),
        partial(few_fields, rows, 16, batch),
        leave_out=() if suite == "gpu" else ("hooks", "functorch", "ew", "backpack"),
    )


_SMALL = "-like (16 to 64 channels, GroupNorm)"
_FAR_SLOWER_ON_VOLUMES = ("hooks", "ghost")
_FAR_SLOWER_ON_LARGE_VOLUMES = (*_FAR_SLOWER_ON_VOLUMES, "functorch")
_WIDTHS = (16, 32, 64, 128)
_RESNET18 = (2, 2, 2, 2)
_RESNET50 = (3, 4, 6, 3)

CASES = (
    replace(unet(48, 2, "cpu"), leave_out=_FAR_SLOWER_ON_VOLUMES),
    replace(unet(48, 4, "cpu"), leave_out=_FAR_SLOWER_ON_LARGE_VOLUMES),
    replace(unet(64, 2, "cpu"), leave_out=_FAR_SLOWER_ON_LARGE_VOLUMES),
    # as its users have it: residual units, InstanceNorm, PReLU
    monai("UNet", 64, 4, " (strided)", channels=_WIDTHS, strides=(2, 2, 2), num_res_units=2),
    # at its defaults: residual blocks, GroupNorm, trilinear upsampling
    monai("SegResNet", 48, 2, init_filters=8),
    # the network of nnU-Net: InstanceNorm with affine terms, transposed k2
    monai(
        "DynUNet",
        48,
        2,
        filters=_WIDTHS,
        kernel_size=(3, 3, 3, 3),
        strides=(1, 2, 2, 2),
        upsample_kernel_size=(2, 2, 2),
    ),
    encoder(128, 256, 2, 8, "cpu"),
    encoder(256, 256, 2, 8, "cpu"),
    encoder(512, 256, 2, 8, "cpu"),
    Case(
        "decoder-t128-d256-b8",
        "language model, T=128, d=256, vocabulary 2000, B=8",
        "cpu",
        partial(models.Decoder, 2000, 128, 256, 2, 4),
        partial(tokens, 2000, 128, 8),
    ),
    Case(
        "vit-32-b32",
        "ViT, 32², patch 4, d=192, B=32",
        "cpu",
        partial(models.VisionTransformer, 32, 4, 192, 4, 3, 10),
        partial(labelled, (3, 32, 32), 10, 32),
    ),
    resnet("-small", 32, 64, "cpu", (2, 2, 2), width=16),
    resnet("18", 32, 64, "cpu", _RESNET18),
    resnet("50", 32, 8, "cpu", _RESNET50, bottleneck=True),
    Case(
        "lstm-t64-d128-b32",
        "embedding + LSTM + classifier, T=64, d=128, B=32",
        "cpu",
        partial(models.SequenceClassifier, 2000, 64, 128),
        partial(_labelled_tokens, 2000, 64, 32),
    ),
    recommender(16_000, 32, (512, 256), 512, "cpu"),
    replace(unet(32, 2, "quick"), leave_out=_FAR_SLOWER_ON_VOLUMES),
    encoder(64, 128, 2, 8, "quick"),
    resnet("-small", 32, 16, "quick", (1, 1, 1), width=16),
    recommender(4_000, 16, (256, 128), 256, "quick"),
    # of a GPU, whose minutes are few: one of each kind of network first
    encoder(512, 1024, 4, 16, "gpu", precision="bfloat16"),
    unet(96, 2, "gpu", precision="bfloat16"),
    resnet("18", 224, 32, "gpu", _RESNET18),
    recommender(64_000, 32, (512, 256), 1024, "gpu"),
    resnet("50", 224, 32, "gpu", _RESNET50, bottleneck=True),
    unet(128, 2, "gpu", precision="bfloat16"),
    encoder(1024, 1024, 4, 8, "gpu", precision="bfloat16"),
    encoder(4096, 1024, 4, 2, "gpu", precision="bfloat16"),
    encoder(2048, 1024, 4, 4, "gpu", precision="bfloat16"),
    unet(96, 4, "gpu", precision="bfloat16"),
)

TITLES = {case.name: case.title for case in CASES}


def find(names: list[str], suite: str) -> list[Case]:
    """The cases of these names, or all of the suite.

    Raises:
        ValueError: a name that no case has.
    """
    known = {case.name: case for case in CASES}
    table.require_known("case", names, known)
    return [known[n] for n in names] or [case for case in CASES if suite == case.suite]
