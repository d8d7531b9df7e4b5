"""A loss must be a mean over rows: one that mixes rows is refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpkernels.training.targets import instantiate

#: greatest relative difference between the loss of several rows and the mean over single rows
_TOLERANCE = 1e-4
_SUSPECTS = {
    "batch": "batch=True computes one overlap for the whole batch; use batch=False",
    "weight": "class weights normalise by the weight sum of the batch; leave weight out",
    "ce_weight": "class weights normalise by the weight sum of the batch; leave ce_weight out",
    "ignore_index": "ignore_index normalises by the batch's voxel count; leave it out",
    "reduction": 'the engine needs the mean over rows; use reduction="mean"',
}


def check_decomposable(
    criterion: nn.Module,
    logits: torch.Tensor,
    label: torch.Tensor,
    block: dict[str, Any],
    *,
    hint: str = "",
) -> None:
    """Compare the loss of several rows, and its gradient, with the mean of single-row losses.

    DP-SGD clips the gradient of one patient's own loss. A loss that mixes patients (a batch-wise
    Dice, a cross-entropy normalised by the batch's class weights) has no such gradient, and the
    guarantee would be void.

    Args:
        criterion: called as criterion(logits, label).
        logits: [rows, ...], made up, so nothing of the data is touched.
        label: [rows, ...], made up; the rows must differ in what a mixing loss could see.
        block: what the criterion was built from.
        hint: what a criterion that fails may need.

    Raises:
        ValueError: the criterion mixes rows, sums over them or does not return a scalar; the
            message names the likely argument.
    """
    rows = len(logits)
    together, joint = _value_and_gradient(criterion, logits, label, hint)
    single = [
        _value_and_gradient(criterion, logits[r : r + 1], label[r : r + 1], hint)
        for r in range(rows)
    ]
    mean = torch.stack([value for value, _ in single]).mean()
    gradient = torch.cat([g for _, g in single]) / rows
    error = max(
        float((together - mean).abs() / mean.abs().clamp_min(1e-12)),
        float((joint - gradient).norm() / gradient.norm().clamp_min(1e-12)),
    )
    if not error <= _TOLERANCE:
        raise ValueError(
            f"loss: {block['_target_']} is not a mean over rows: on {rows} rows at once it "
            f"differs from the mean over single rows by {error:.2g} (relative), so a patient's own "
            f"gradient does not exist. {_advice(block)}"
        )


def class_criterion(block: dict[str, Any], classes: int) -> nn.Module:
    """Build a loss of scores [rows, classes] and labels [rows], and check it on made-up rows.

    Raises:
        ValueError: the block cannot be built, or see `check_decomposable`.
    """
    criterion = instantiate(block, "loss")
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2 * classes, classes, generator=generator)
    check_decomposable(criterion, scores, torch.arange(2 * classes) % classes, block)
    return criterion


def _value_and_gradient(
    criterion: nn.Module, logits: torch.Tensor, label: torch.Tensor, hint: str
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_(True)
    try:
        value = criterion(leaf, label)
    except Exception as error:
        raise ValueError(
            f"loss: {type(criterion).__name__} fails on logits {tuple(logits.shape)} and class "
            f"indices {tuple(label.shape)}: {error}. {hint}"
        ) from error
    if value.dim() != 0:
        raise ValueError(
            f"loss: expected a scalar (the mean over rows), got shape {tuple(value.shape)}; "
            f"{_SUSPECTS['reduction']}"
        )
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def _advice(block: dict[str, Any]) -> str:
    guilty = [
        advice
        for key, advice in _SUSPECTS.items()
        if block.get(key) not in (None, "mean") and block[key] is not False
    ]
    if guilty:
        return f"Likely cause: {'; '.join(guilty)}."
    return (
        "Use a loss that averages over rows, such as torch.nn.CrossEntropyLoss, "
        "monai.losses.DiceCELoss or DiceFocalLoss."
    )
