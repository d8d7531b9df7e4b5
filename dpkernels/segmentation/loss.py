"""The loss: any criterion that is a mean over rows; one that mixes rows is refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpkernels.segmentation.model import head_outputs
from dpkernels.training.criteria import check_decomposable
from dpkernels.training.targets import instantiate

_HINT = "MONAI losses need softmax=True and to_onehot_y=True"


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
    check_decomposable(criterion, *_made_up_rows(classes), block, hint=_HINT)
    return SegmentationLoss(criterion)


def _made_up_rows(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class scores and labels of four rows that hold more foreground from row to row."""
    generator = torch.Generator().manual_seed(0)
    rows, size = 4, 8
    logits = torch.randn(rows, classes, size, size, size, generator=generator)
    label = torch.zeros(rows, 1, size, size, size)
    for row in range(1, rows):
        chance = torch.rand(label.shape[1:], generator=generator)
        kind = torch.randint(1, classes, label.shape[1:], generator=generator)
        label[row] = torch.where(chance < 0.25 * row, kind, torch.zeros_like(kind))
    return logits, label


def _resize(label: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    if label.shape[2:] == head.shape[2:]:
        return label
    return nn.functional.interpolate(label.float(), size=head.shape[2:], mode="nearest-exact")
