"""Rows and samples: the one place that says which rows of a layer belong to which sample.

A layer sees ``rows`` along its sample axis. Where a network folds windows or heads into that axis,
or where several views of one patient stand side by side, ``rows = samples * k`` and the rows of one
sample are adjacent. Every rule regroups its gradients through this module.
"""

from __future__ import annotations

import torch


def rows_per_sample(rows: int, samples: int) -> int | None:
    """How many rows belong to each sample, or None where rows are not a multiple of samples."""
    return rows // samples if rows % samples == 0 and rows >= samples else None


def without_samples(name: str, tensor: torch.Tensor) -> ValueError:
    """The error for an argument of a layer that has no sample axis."""
    return ValueError(
        f"{name} of shape {tuple(tensor.shape)} has no sample axis; give it a batched input"
    )


def merge_positions(tensor: torch.Tensor, samples: int) -> torch.Tensor:
    """[rows, *, D] -> [samples, T, D]: every position of every row of a sample, one after another.

    Axes between the first and the last are positions; [rows, D] is one position per row.
    """
    return tensor.reshape(samples, -1, tensor.shape[-1])


def sum_rows(grad_sample: torch.Tensor, samples: int) -> torch.Tensor:
    """[rows, *shape] -> [samples, *shape]: sum the gradients of the rows of each sample."""
    if grad_sample.shape[0] == samples:
        return grad_sample
    return grad_sample.reshape(samples, -1, *grad_sample.shape[1:]).sum(1)
