"""The loss: any criterion that is a mean over rows; one that mixes rows is refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpkernels.segmentation.model import head_outputs, instantiate

_SUSPECTS = {
    "batch": "batch=True computes one overlap for the whole batch; use batch=False",
    "weight": "class weights normalise by the weight sum of the batch; leave weight out",
    "ce_weight": "class weights normalise by the weight sum of the batch; leave ce_weight out",
    "ignore_index": "ignore_index normalises by the batch's voxel count; leave it out",
    "reduction": 'the engine needs the mean over rows; use reduction="mean"',
}


class SegmentationLoss(nn.Module):
    """A criterion over one or several deep-supervision heads.

    Heads are weighted 1, 1/2, 1/4, ... (finest first, normalised to sum 1), the target being
    resampled to each head's grid.
    """

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, output: Any, label: torch.Tensor) -> torch.Tensor:
        """The mean loss over rows.

        Args:
            output: network output, [R, C, X, Y, Z] or several such heads.
            label: [R, 1, X, Y, Z], class indices.
        """
        heads = head_outputs(output)
        weights = [0.5**i for i in range(len(heads))]
        total = sum(
            weight * self.criterion(head.float(), _resize(label, head))
            for weight, head in zip(weights, heads, strict=True)
        )
        return total / sum(weights)


def build_loss(block: dict[str, Any], classes: int) -> SegmentationLoss:
    """Build the criterion and prove on made-up rows that it is a mean over rows.

    Args:
        block: `_target_` and keyword arguments.
        classes: number of classes.

    Raises:
        ValueError: the criterion mixes rows, sums over them or does not return a scalar; the
            message names the likely argument.
    """
    criterion = instantiate(block, "loss")
    check_decomposable(criterion, classes, block)
    return SegmentationLoss(criterion)


def check_decomposable(
    criterion: nn.Module, classes: int, block: dict[str, Any], *, tolerance: float = 1e-4
) -> None:
    """Compare the loss of several rows, and its gradient, with the mean of single-row losses.

    DP-SGD clips the gradient of one patient's own loss. A loss that mixes patients (a batch-wise
    Dice, a cross-entropy normalised by the batch's class weights) has no such gradient, and the
    guarantee would be void. The rows are made up, so nothing of the data is touched.

    Raises:
        ValueError: see `build_loss`.
    """
    generator = torch.Generator().manual_seed(0)
    rows, size = 4, 8
    logits = torch.randn(rows, classes, size, size, size, generator=generator)
    label = torch.zeros(rows, 1, size, size, size)
    for row in range(1, rows):
        chance = torch.rand(label.shape[1:], generator=generator)
        kind = torch.randint(1, classes, label.shape[1:], generator=generator)
        label[row] = torch.where(chance < 0.25 * row, kind, torch.zeros_like(kind))
    together, joint = _value_and_gradient(criterion, logits, label)
    single = [
        _value_and_gradient(criterion, logits[r : r + 1], label[r : r + 1]) for r in range(rows)
    ]
    mean = torch.stack([value for value, _ in single]).mean()
    gradient = torch.cat([g for _, g in single]) / rows
    error = max(
        float((together - mean).abs() / mean.abs().clamp_min(1e-12)),
        float((joint - gradient).norm() / gradient.norm().clamp_min(1e-12)),
    )
    if error > tolerance:
        raise ValueError(
            f"loss: {block['_target_']} is not a mean over rows: on {rows} rows at once it "
            f"differs from the mean over single rows by {error:.2g} (relative), so a patient's own "
            f"gradient does not exist. {_advice(block)}"
        )


def _value_and_gradient(
    criterion: nn.Module, logits: torch.Tensor, label: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_(True)
    try:
        value = criterion(leaf, label)
    except Exception as error:
        raise ValueError(
            f"loss: {type(criterion).__name__} fails on logits {tuple(logits.shape)} and class "
            f"indices {tuple(label.shape)}: {error}. MONAI losses need softmax=True and "
            "to_onehot_y=True"
        ) from error
    if value.dim() != 0:
        raise ValueError(
            f"loss: expected a scalar (the mean over rows), got shape {tuple(value.shape)}; "
            f"{_SUSPECTS['reduction']}"
        )
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def _advice(block: dict[str, Any]) -> str:
    harmless = {None, False, "mean"}
    guilty = [
        advice
        for key, advice in _SUSPECTS.items()
        if key in block
        and not (isinstance(block[key], (str, bool)) and block[key] in harmless)
        and block[key] is not None
    ]
    return (
        "Likely cause: " + "; ".join(guilty) + "."
        if guilty
        else (
            "Use a loss that averages over rows, such as monai.losses.DiceCELoss or DiceFocalLoss."
        )
    )


def _resize(label: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    if label.shape[2:] == head.shape[2:]:
        return label
    return nn.functional.interpolate(label.float(), size=head.shape[2:], mode="nearest-exact")
