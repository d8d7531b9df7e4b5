"""What a rule hands to the planner for one parameter and one call of its layer.

An operand knows the canonical tensors of its op family and answers three questions with them:
the squared norm of each sample's gradient, the per-sample gradients themselves, and the clipped
sum for given clip factors. It also states what each answer costs; the planner decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from dpkernels import ops
from dpkernels.layers.fold import sum_rows
from dpkernels.ops.conv.geometry import Geometry
from dpkernels.ops.conv.gram import gradient_flops, gram_flops


@dataclass(frozen=True)
class Cost:
    """Work of one strategy for one operand, beyond which nothing is hidden.

    Attributes:
        flops: floating-point operations, norm and clipped gradient together.
        traffic: bytes moved beyond reading the operand once.
        kept: bytes held from the layer's backward until the end of the backward pass.
    """

    flops: float
    traffic: float
    kept: int


class Operand(Protocol):
    """One parameter's gradient in one call: a sum of outer products, kept factored."""

    def norm_sq(self) -> torch.Tensor:
        """[B]: squared norm of each sample's gradient."""

    def grad_sample(self) -> torch.Tensor:
        """[B, *param.shape]: each sample's gradient."""

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        """[*param.shape]: sum over samples of clip_factor[b] times the gradient of sample b."""

    def costs(self) -> dict[str, Cost]:
        """The strategies on offer (``store``, ``gram``) and what each costs."""

    def backend(self, strategy: str) -> str:
        """The backend whose kernel the strategy runs first."""


def _nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _stored_bytes(samples: int, numel: int, like: torch.Tensor) -> int:
    return samples * numel * (8 if like.dtype == torch.float64 else 4)


@dataclass(frozen=True)
class LinearOperand:
    """activations: [B, T, I], backprops: [B, T, O]; the gradient of a sample is G^T A, [O, I]."""

    activations: torch.Tensor
    backprops: torch.Tensor

    def norm_sq(self) -> torch.Tensor:
        return ops.linear_norm_sq(self.activations, self.backprops)

    def grad_sample(self) -> torch.Tensor:
        return ops.linear_grad_sample(self.activations, self.backprops)

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        return ops.linear_clipped_grad(self.activations, self.backprops, clip_factor)

    def backend(self, strategy: str) -> str:
        op = ops.linear_grad_sample if strategy == "store" else ops.linear_norm_sq
        return op.backend(self.activations, self.backprops)

    def costs(self) -> dict[str, Cost]:
        samples, length, inputs = self.activations.shape
        outputs = self.backprops.shape[2]
        gradient = 2.0 * samples * length * inputs * outputs
        stored = _stored_bytes(samples, inputs * outputs, self.backprops)
        stash = _nbytes(self.activations, self.backprops)
        gram = 1.0 * samples * length * (length + 1) * (inputs + outputs)
        return {
            "store": Cost(gradient + stored / 4, 2.0 * stored, stored),
            "gram": Cost(gradient + gram, 2.0 * stash, stash),
        }


@dataclass(frozen=True)
class ConvOperand:
    """input: [R, Cin, *S], backprops: [R, Cout, *S'], R rows of `samples` samples.

    The gradient of a row is the ordinary convolution's weight gradient, [Cout, Cin/groups, *k].
    """

    input: torch.Tensor
    backprops: torch.Tensor
    weight_shape: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    samples: int

    def _geometry(self) -> tuple[list[int], list[int], list[int], list[int], int]:
        return self.weight_shape, self.stride, self.padding, self.dilation, self.groups

    def norm_sq(self) -> torch.Tensor:
        if self.input.shape[0] != self.samples:
            return self.grad_sample().flatten(1).square().sum(1)
        return ops.conv_norm_sq(self.input, self.backprops, *self._geometry())

    def grad_sample(self) -> torch.Tensor:
        rows = ops.conv_grad_sample(self.input, self.backprops, *self._geometry())
        return sum_rows(rows, self.samples)

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        factor = clip_factor.repeat_interleave(self.input.shape[0] // self.samples)
        return ops.conv_clipped_grad(self.input, self.backprops, factor, *self._geometry())

    def backend(self, strategy: str) -> str:
        op = ops.conv_grad_sample if strategy == "store" else ops.conv_norm_sq
        return op.backend(self.input, self.backprops, *self._geometry())

    def costs(self) -> dict[str, Cost]:
        rows = self.input.shape[0]
        geometry = Geometry.of(*self._geometry())
        stored = _stored_bytes(rows, geometry.weights, self.backprops)
        gradient = rows * gradient_flops(self.backprops.shape, geometry)
        costs = {"store": Cost(gradient + stored / 4, 2.0 * stored, stored)}
        if rows == self.samples:
            stash = _nbytes(self.input, self.backprops)
            norm = min(
                gradient, rows * gram_flops(self.input.shape, self.backprops.shape, geometry)
            )
            costs["gram"] = Cost(gradient + norm, 2.0 * stash, stash)
        return costs


@dataclass(frozen=True)
class EmbeddingOperand:
    """indices: [B, T] int64, backprops: [B, T, D]; `padding_idx` counts for nothing."""

    indices: torch.Tensor
    backprops: torch.Tensor
    num_embeddings: int
    padding_idx: int

    def norm_sq(self) -> torch.Tensor:
        return ops.embedding_norm_sq(self.indices, self.backprops, self.padding_idx)

    def grad_sample(self) -> torch.Tensor:
        return ops.embedding_grad_sample(
            self.indices, self.backprops, self.num_embeddings, self.padding_idx
        )

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        return ops.embedding_clipped_grad(
            self.indices, self.backprops, clip_factor, self.num_embeddings, self.padding_idx
        )

    def backend(self, strategy: str) -> str:
        if strategy == "gram":
            return ops.embedding_norm_sq.backend(self.indices, self.backprops, self.padding_idx)
        return ops.embedding_grad_sample.backend(
            self.indices, self.backprops, self.num_embeddings, self.padding_idx
        )

    def costs(self) -> dict[str, Cost]:
        samples = self.indices.shape[0]
        table = self.num_embeddings * self.backprops.shape[2]
        stored = _stored_bytes(samples, table, self.backprops)
        stash = _nbytes(self.indices, self.backprops)
        work = 4.0 * self.backprops.numel()
        return {
            "store": Cost(work + stored / 4, 2.0 * stored, stored),
            "gram": Cost(work, 4.0 * stash, stash),
        }


@dataclass(frozen=True)
class StoredOperand:
    """Per-sample gradients that exist already: biases, affine scales, what vmap returned."""

    value: torch.Tensor

    def norm_sq(self) -> torch.Tensor:
        return self.value.reshape(len(self.value), -1).square().sum(1)

    def grad_sample(self) -> torch.Tensor:
        return self.value

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        return torch.einsum("b,b...->...", clip_factor.to(self.value.dtype), self.value)

    def backend(self, strategy: str) -> str:
        return "autograd"

    def costs(self) -> dict[str, Cost]:
        stored = _nbytes(self.value)
        return {"store": Cost(stored / 2, 1.0 * stored, stored)}


@dataclass(frozen=True)
class PieceOperand:
    """Rows `start` and on of a parameter with `total` rows: one of several packed weights.

    The rest of this contribution is zero; contributions of other pieces are added as usual.
    """

    piece: Operand
    start: int
    total: int

    def norm_sq(self) -> torch.Tensor:
        return self.piece.norm_sq()

    def grad_sample(self) -> torch.Tensor:
        piece = self.piece.grad_sample()
        whole = piece.new_zeros(len(piece), self.total, *piece.shape[2:])
        whole.narrow(1, self.start, piece.shape[1]).copy_(piece)
        return whole

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        piece = self.piece.clipped_grad(clip_factor)
        whole = piece.new_zeros(self.total, *piece.shape[1:])
        whole.narrow(0, self.start, len(piece)).copy_(piece)
        return whole

    def backend(self, strategy: str) -> str:
        return self.piece.backend(strategy)

    def costs(self) -> dict[str, Cost]:
        return self.piece.costs()
