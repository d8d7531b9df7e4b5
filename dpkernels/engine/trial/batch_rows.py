"""Where a batch has its samples, and whether the samples can tell something."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import keystr, tree_flatten_with_path

from dpkernels.engine.capture.layer import is_packed, leaves_of


@dataclass(frozen=True)
class BatchRows:
    """Where a batch has its samples: `rows` rows on `axis`, each sample `views` adjacent ones.

    A tensor of the batch is batched if it has `rows` rows on `axis`, and is none of `shared`: ids
    of tensors that are the same for all samples, a mask [T, T] in a batch of T.
    """

    rows: int
    views: int
    axis: int
    shared: frozenset[int] = frozenset()

    @classmethod
    def of(cls, batch: Any, rows: int, views: int, axis: int, shared: Collection[str]) -> BatchRows:
        """The same, where `shared` names tensors by their places among nested arguments."""
        leaves, _ = tree_flatten_with_path(batch, is_leaf=is_packed)
        ids = frozenset(id(leaf) for path, leaf in leaves if keystr(path) in shared)
        return cls(rows, views, axis, ids)

    @property
    def samples(self) -> int:
        return self.rows // self.views

    def holds(self, leaf: Any) -> bool:
        """Whether a leaf of the batch is a batched tensor."""
        tensor = isinstance(leaf, torch.Tensor) and leaf.ndim > self.axis
        return tensor and leaf.shape[self.axis] == self.rows and id(leaf) not in self.shared

    def by_sample(self, leaf: torch.Tensor) -> torch.Tensor:
        """[samples, n]: the values of a batched tensor."""
        values = dense(leaf.detach())
        if values.is_floating_point() and values.itemsize == 1:  # few operators know float8
            values = values.float()
        return values.movedim(self.axis, 0).reshape(self.samples, -1)

    def all_alike(self, batch: Any) -> bool:
        """Whether all samples are alike, such as the zeros of a forward pass by hand."""
        for leaf in leaves_of(batch):
            if is_packed(leaf):
                return False
            if self.holds(leaf):
                values = self.by_sample(leaf)
                if not bool((values == values[:1]).all()):
                    return False
        return True

    def not_finite(self, batch: Any) -> torch.Tensor:
        """[samples]: whether a sample of the batch has a value that is not finite."""
        broken = torch.zeros(self.samples, dtype=torch.bool)
        for leaf in leaves_of(batch):
            if is_packed(leaf):
                broken[owners(leaf)[~leaf.data.isfinite().flatten(1).all(1).cpu()]] = True
            elif self.holds(leaf):
                broken |= ~self.by_sample(leaf).isfinite().all(1).cpu()
        return broken

    def can_tell(self, batch: Any) -> bool:
        """Whether poisoning some samples can show that samples mix: two samples that differ."""
        return self.samples > 1 and not self.all_alike(batch)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without the layout of a sparse one."""
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def owners(packed: PackedSequence) -> torch.Tensor:
    """[steps of all samples]: the sample behind each row of a packed sequence's data."""
    places = packed.sorted_indices
    samples = torch.arange(int(packed.batch_sizes[0])) if places is None else places.cpu()
    return torch.cat([samples[:count] for count in packed.batch_sizes.tolist()])
