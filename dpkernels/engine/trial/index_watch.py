"""Whether a forward pass makes indices from floats, or takes labels for indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: operators whose integers come from floats, and do not stay in range where these are NaN
_TO_INDICES = ("sort", "topk", "bucketize", "searchsorted", "argsort", "kthvalue", "histc")
#: (not a view of a float's bits: fingerprints take such views of every tensor)
_CONVERSIONS = ("_to_copy", "copy_", "floor_divide")
#: operators that read at places which a tensor of integers states
_INDEXED = ("index", "embedding", "gather", "scatter", "take", "one_hot", "put")


class IndexWatch(TorchDispatchMode):
    """Looks at the operators of a pass.

    An index that is made from NaN, or a label that PyTorch's losses ignore taken for an index, ends
    a process on a GPU by a device assertion.

    Args:
        labels: tensors that may be labels.

    Attributes:
        from_floats: whether an operator made integers from floats.
        from_labels: whether labels, or integers made from them, were indices.
    """

    def __init__(self, labels: Sequence[torch.Tensor]):
        super().__init__()
        self.from_floats = self.from_labels = False
        #: tensors that hold labels, kept alive so that their ids stay theirs
        self._labels = {id(label): label for label in labels}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        floats = any(t.is_floating_point() for t in taken)
        whole = [t for t in made if _is_whole(t)]
        if floats and (name in _TO_INDICES or (whole and name in _CONVERSIONS)):
            self.from_floats = True
        if any(id(t) in self._labels for t in taken):
            if any(word in name for word in _INDEXED):
                self.from_labels = True
            self._labels.update((id(t), t) for t in whole)
        return out


def _is_whole(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
