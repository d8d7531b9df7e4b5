"""Networks without batch statistics, as their authors write them (what rivals need: adapt.py)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

#: of group normalisation
_GROUPS = 8


class UNet3d(nn.Module):
    """3D U-Net with full-resolution 3^3 convolutions, GroupNorm and transposed convolutions k2 s2.

    Args:
        base: channels at full resolution, doubled at a half of it and again at a quarter; 24
            makes 0.76 M parameters.
    """

    def __init__(self, base: int = 24):
        super().__init__()
        widths = (base, 2 * base, 4 * base)
        self.down = nn.ModuleList(_double_conv(a, b) for a, b in pairwise((1, *widths)))
        upward = widths[::-1]
        self.lift = nn.ModuleList(
            nn.ConvTranspose3d(a, b, kernel_size=2, stride=2) for a, b in pairwise(upward)
        )
        self.up = nn.ModuleList(_double_conv(2 * width, width) for width in upward[1:])
        self.head = nn.Conv3d(base, 2, kernel_size=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Class scores [B, 2, X, Y, Z] for [B, 1, X, Y, Z]."""
        skips = []
        x = image
        for level, block in enumerate(self.down):
            x = block(F.max_pool3d(x, 2) if level else x)
            skips.append(x)
        for lift, block, skip in zip(self.lift, self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([skip, lift(x)], dim=1))
        return self.head(x)


def _double_conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, kernel_size=3, padding=1),
        nn.GroupNorm(_GROUPS, outputs),
        nn.ReLU(),
        nn.Conv3d(outputs, outputs, kernel_size=3, padding=1),
        nn.GroupNorm(_GROUPS, outputs),
        nn.ReLU(),
    )


class AttentionBlock(nn.Module):
    """Pre-norm transformer block: attention and an MLP of width 4 d."""

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, d] -> [B, T, d]."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.contract(F.gelu(self.expand(self.norm_mlp(x))))


class Encoder(nn.Module):
    """Transformer encoder over feature sequences with a classification head."""

    def __init__(self, width: int, depth: int, heads: int, classes: int = 10):
        super().__init__()
        self.blocks = nn.Sequential(*(AttentionBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, d] -> [B, classes]."""
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class PositionEmbedding(nn.Module):
    """Adds a learned vector per position, [1, T, d]."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(1, length, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, d] -> [B, T, d]."""
        return x + self.weight


class Decoder(nn.Module):
    """Causal language model: token and position embeddings, blocks, head over the vocabulary."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = PositionEmbedding(length, width)
        blocks = (AttentionBlock(width, heads, causal=True) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] int64 -> [B, vocabulary, T]."""
        x = self.norm(self.blocks(self.positions(self.tokens(ids))))
        return self.head(x).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT: patches by a strided convolution, learned positions, mean pooling."""

    def __init__(self, side: int, patch: int, width: int, depth: int, heads: int, classes: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.positions = PositionEmbedding((side // patch) ** 2, width)
        self.encoder = Encoder(width, depth, heads, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, side, side] -> [B, classes]."""
        return self.encoder(self.positions(self.patches(image).flatten(2).transpose(1, 2)))


class ResidualBlock(nn.Module):
    """Basic block (two 3^2 convolutions) or bottleneck (1, 3, 1) with GroupNorm."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            shapes = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        layers: list[nn.Module] = []
        for a, b, kernel, step in shapes:
            layers += [
                nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False),
                nn.GroupNorm(_GROUPS, b),
                nn.ReLU(),
            ]
        self.path = nn.Sequential(*layers[:-1])
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(_GROUPS, outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        return F.relu(self.path(x) + self.skip(x))


class ResNet(nn.Module):
    """ResNet with GroupNorm: depth 18 is ``blocks=(2, 2, 2, 2)``, 50 adds ``bottleneck=True``.

    Args:
        large_images: the 7^2 stride-2 stem with max-pooling instead of one 3^2 convolution.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        width: int = 64,
        *,
        bottleneck: bool = False,
        large_images: bool = False,
        classes: int = 10,
    ):
        super().__init__()
        kernel, stride = (7, 2) if large_images else (3, 1)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False),
            nn.GroupNorm(_GROUPS, width),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1) if large_images else nn.Identity(),
        )
        body: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            inner = width * 2**stage
            for index in range(count):
                stride = 2 if stage and not index else 1
                body.append(ResidualBlock(inputs, inner, stride, bottleneck))
                inputs = 4 * inner if bottleneck else inner
        self.body = nn.Sequential(*body)
        self.head = nn.Linear(inputs, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, classes]."""
        return self.head(self.body(self.stem(image)).mean(dim=(2, 3)))


class Recommender(nn.Module):
    """One embedding table for all categorical fields, then an MLP of two classes."""

    def __init__(self, rows: int, fields: int, width: int, hidden: Sequence[int]):
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.mlp = perceptron(fields * width, *hidden, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, fields] int64 -> [B, 2]."""
        return self.mlp(self.table(ids).flatten(1))


class SequenceClassifier(nn.Module):
    """Token embedding, LSTM, and a classifier on the state after the last token."""

    def __init__(self, vocabulary: int, embedded: int, width: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, embedded)
        self.lstm = nn.LSTM(embedded, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] int64 -> [B, 2]."""
        states, _ = self.lstm(self.tokens(ids))
        return self.head(states[:, -1])


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them: [B, first of `widths`] -> [B, last of them]."""
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def of_monai(network: str, classes: int = 2, **options: Any) -> nn.Module:
    """MONAI's network of this name: [B, 1, X, Y, Z] -> [B, classes, X, Y, Z]."""
    from monai.networks import nets

    make = getattr(nets, network)
    return make(spatial_dims=3, in_channels=1, out_channels=classes, **options)


class GPT2(nn.Module):
    """GPT-2 of Hugging Face, with its dropout and its head tied to the embedding."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"vocab_size": vocabulary, "n_positions": length, "n_embd": width}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(**sizes, **ends, n_layer=depth, n_head=heads, use_cache=False)
        self.inner = GPT2LMHeadModel(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] int64 -> [B, vocabulary, T]."""
        return self.inner(ids).logits.transpose(1, 2)
