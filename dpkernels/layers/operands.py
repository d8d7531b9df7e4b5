"""What a rule hands to the planner for one parameter and one call of its layer.

An operand knows the canonical tensors of its op family and answers three questions with them:
the squared norm of each sample's gradient, the per-sample gradients themselves, and the clipped
sum for given clip factors. It also states which strategies it offers and what each costs; the
planner decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from dpkernels import ops
from dpkernels.layers import margins
from dpkernels.layers.costs import Offers, nbytes, offers, stored_bytes, stored_offers
from dpkernels.layers.fold import sum_rows
from dpkernels.ops.conv.geometry import Geometry
from dpkernels.ops.conv.gram import gradient_flops, gram_flops, is_cheaper
from dpkernels.ops.linear import gram as linear_gram
from dpkernels.ops.registry import Op
from dpkernels.ops.sums import squared_norms

#: the op that a strategy runs first, and its arguments
Call = tuple[Op, tuple[Any, ...]]

_REDUCED = (
    "products of float32 are rounded to fewer bits (TF32), so the factors' norm is not that of the "
    "values that are summed"
)


class Factored(Protocol):
    """A gradient that is not formed before the clip factors are known."""

    def norm_sq(self) -> torch.Tensor:
        """[B]: squared norm of each sample's gradient."""

    def norm_bound(self, norm_sq: torch.Tensor) -> torch.Tensor:
        """[B], float64: what a sample's clipped contribution can reach, before its clip factor.

        Args:
            norm_sq: what :meth:`norm_sq` returned.
        """

    def grad_sample(self) -> torch.Tensor:
        """[B, *param.shape]: each sample's gradient."""

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        """[*param.shape]: sum over samples of clip_factor[b] times the gradient of sample b."""


class Operand(Factored, Protocol):
    """One parameter's gradient in one call: a sum of outer products, kept factored."""

    @property
    def samples(self) -> int:
        """Number of samples, B."""

    def part(self, samples: slice) -> Operand:
        """The same for some of the samples."""

    def offers(self) -> Offers:
        """By strategy, what it costs or why it is not on offer."""

    def kernel(self, strategy: str) -> Call | None:
        """What the strategy runs first; None where autograd has done it."""


@dataclass(frozen=True)
class Around:
    """An operand around another, which answers whatever a subclass does not answer itself."""

    operand: Operand

    @property
    def samples(self) -> int:
        return self.operand.samples

    def norm_sq(self) -> torch.Tensor:
        return self.operand.norm_sq()

    def norm_bound(self, norm_sq: torch.Tensor) -> torch.Tensor:
        return self.operand.norm_bound(norm_sq)

    def grad_sample(self) -> torch.Tensor:
        return self.operand.grad_sample()

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        return self.operand.clipped_grad(clip_factor)

    def part(self, samples: slice) -> Operand:
        return replace(self, operand=self.operand.part(samples))

    def kernel(self, strategy: str) -> Call | None:
        return self.operand.kernel(strategy)

    def offers(self) -> Offers:
        return self.operand.offers()


@dataclass(frozen=True)
class LinearOperand:
    """activations: [B, T, I], backprops: [B, T, O]; the gradient of a sample is G^T A, [O, I]."""

    activations: torch.Tensor
    backprops: torch.Tensor

    @property
    def samples(self) -> int:
        return self.activations.shape[0]

    def norm_sq(self) -> torch.Tensor:
        return ops.linear_norm_sq(self.activations, self.backprops)

    def grad_sample(self) -> torch.Tensor:
        return ops.linear_grad_sample(self.activations, self.backprops)

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        return ops.linear_clipped_grad(self.activations, self.backprops, clip_factor)

    def norm_bound(self, norm_sq: torch.Tensor) -> torch.Tensor:
        length, inputs = self.activations.shape[1:]
        if length == 1:
            return margins.of_outer_product(norm_sq, margins.product_unit(self.backprops))
        magnitude = margins.magnitude(self.activations, self.backprops)
        return margins.of_gram(norm_sq, magnitude, length, inputs + self.backprops.shape[2])

    def part(self, samples: slice) -> LinearOperand:
        return LinearOperand(self.activations[samples], self.backprops[samples])

    def kernel(self, strategy: str) -> Call:
        op = ops.linear_norm_sq if strategy == "gram" else ops.linear_grad_sample
        return op, (self.activations, self.backprops)

    def offers(self) -> Offers:
        samples, length, inputs = self.activations.shape
        outputs = self.backprops.shape[2]
        gram: float | str = linear_gram.gram_flops(self.activations, self.backprops)
        if length > 1 and not linear_gram.is_cheaper(self.activations, self.backprops):
            gram = f"{length} positions: the gradient itself takes fewer operations"
        elif length > 1 and margins.product_unit(self.backprops):
            gram = _REDUCED
        return offers(
            samples,
            2.0 * samples * length * inputs * outputs,
            stored_bytes(samples, inputs * outputs, self.backprops),
            nbytes(self.activations, self.backprops),
            "gram",
            gram,
            "one position: gram is a product of two norms" if length == 1 else None,
        )


@dataclass(frozen=True)
class ConvOperand:
    """input: [R, Cin, *S], backprops: [R, Cout, *S'], R rows of `samples` samples.

    The gradient of a row is the ordinary convolution's weight gradient, [Cout, Cin/groups, *k].
    """

    input: torch.Tensor
    backprops: torch.Tensor
    geometry: Geometry
    samples: int

    def norm_sq(self) -> torch.Tensor:
        return ops.conv_norm_sq(self.input, self.backprops, *self.geometry)

    def grad_sample(self) -> torch.Tensor:
        rows = ops.conv_grad_sample(self.input, self.backprops, *self.geometry)
        return sum_rows(rows, self.samples)

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        factor = clip_factor.repeat_interleave(self.input.shape[0] // self.samples)
        return ops.conv_clipped_grad(self.input, self.backprops, factor, *self.geometry)

    def norm_bound(self, norm_sq: torch.Tensor) -> torch.Tensor:
        geometry = self.geometry
        magnitude = margins.conv_magnitude(self.input, self.backprops, geometry)
        features = sum(geometry.channels) + torch.Size(geometry.kernel).numel()
        positions = self.backprops.shape[2:].numel()
        return margins.of_gram(norm_sq, magnitude, positions, features)

    def part(self, samples: slice) -> ConvOperand:
        rows = self.input.shape[0] // self.samples
        start, stop, _ = samples.indices(self.samples)
        own = slice(start * rows, stop * rows)
        return replace(
            self, input=self.input[own], backprops=self.backprops[own], samples=stop - start
        )

    def kernel(self, strategy: str) -> Call:
        op = ops.conv_norm_sq if strategy == "channel_gram" else ops.conv_grad_sample
        return op, (self.input, self.backprops, *self.geometry)

    def offers(self) -> Offers:
        rows = self.input.shape[0]
        geometry = self.geometry
        shapes = self.input.shape, self.backprops.shape
        gram: float | str = rows * gram_flops(*shapes, geometry)
        if rows != self.samples:
            gram = f"{rows // self.samples} rows per sample, whose gradients are summed first"
        elif not is_cheaper(*shapes, geometry):
            gram = "the gradient itself takes fewer operations"
        elif margins.product_unit(self.backprops, convolution=True):
            gram = _REDUCED
        return offers(
            self.samples,
            rows * gradient_flops(self.backprops.shape, geometry),
            stored_bytes(rows, geometry.weights, self.backprops),
            nbytes(self.input, self.backprops),
            "channel_gram",
            gram,
        )


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

    @property
    def samples(self) -> int:
        return self.indices.shape[0]

    def norm_bound(self, norm_sq: torch.Tensor) -> torch.Tensor:
        return margins.of_segments(norm_sq, self.backprops)

    def part(self, samples: slice) -> EmbeddingOperand:
        return replace(self, indices=self.indices[samples], backprops=self.backprops[samples])

    def kernel(self, strategy: str) -> Call:
        if strategy == "gram":
            return ops.embedding_norm_sq, (self.indices, self.backprops, self.padding_idx)
        arguments = (self.indices, self.backprops, self.num_embeddings, self.padding_idx)
        return ops.embedding_grad_sample, arguments

    def offers(self) -> Offers:
        table = self.num_embeddings * self.backprops.shape[2]
        return offers(
            self.samples,
            2.0 * self.backprops.numel(),
            stored_bytes(self.samples, table, self.backprops),
            nbytes(self.indices, self.backprops),
            "gram",
            2.0 * self.backprops.numel(),
            "a table for every sample would be formed twice",
        )


@dataclass(frozen=True)
class StoredOperand:
    """Per-sample gradients that exist already: biases, affine scales, what vmap returned."""

    value: torch.Tensor

    def norm_sq(self) -> torch.Tensor:
        return squared_norms(self.value)

    def grad_sample(self) -> torch.Tensor:
        return self.value

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        return torch.einsum("b,b...->...", clip_factor.to(self.value.dtype), self.value)

    @property
    def samples(self) -> int:
        return len(self.value)

    def norm_bound(self, norm_sq: torch.Tensor) -> torch.Tensor:
        return margins.of_values(norm_sq)

    def part(self, samples: slice) -> StoredOperand:
        return StoredOperand(self.value[samples])

    def kernel(self, strategy: str) -> None:
        return None

    def offers(self) -> Offers:
        return stored_offers(self.samples, nbytes(self.value))


@dataclass(frozen=True)
class PieceOperand(Around):
    """Rows `start` and on of a parameter with `total` rows: one of several packed weights.

    The rest of this contribution is zero; contributions of other pieces are added as usual.
    """

    start: int
    total: int

    def grad_sample(self) -> torch.Tensor:
        piece = self.operand.grad_sample()
        whole = piece.new_zeros(len(piece), self.total, *piece.shape[2:])
        whole.narrow(1, self.start, piece.shape[1]).copy_(piece)
        return whole

    def clipped_grad(self, clip_factor: torch.Tensor) -> torch.Tensor:
        piece = self.operand.clipped_grad(clip_factor)
        whole = piece.new_zeros(self.total, *piece.shape[1:])
        whole.narrow(0, self.start, len(piece)).copy_(piece)
        return whole
