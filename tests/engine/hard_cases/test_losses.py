"""Losses and criteria that other engines clip wrongly: right here, or found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpkernels import PrivacyEngine
from tests.engine.support import (
    made_private,
    squared_loss,
    values,
)
from tests.engine.truth import assert_private


@pytest.mark.parametrize("per_sample", [False, True])
def test_loss_of_shape_b1(per_sample: bool) -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        target = (batch[0][:, :1] > 0).double()
        if per_sample:
            return nn.BCEWithLogitsLoss(reduction="none")(model(batch[0]), target).mean()
        return nn.BCEWithLogitsLoss()(model(batch[0]), target)

    assert_private(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double(), loss, (values(6, 5),)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_ordinary_criterion_is_clipped(reduction: str) -> None:
    torch.manual_seed(0)
    x = values(8, 5).float() * 50
    _, model, optimizer, _ = made_private(nn.Linear(5, 3), x, loss_reduction=reduction)
    nn.CrossEntropyLoss(reduction=reduction)(model(x), torch.zeros(8, dtype=torch.long)).backward()
    total = torch.sqrt(sum(p.summed_grad.square().sum() for p in model.parameters()))
    assert optimizer.last_step.per_sample_norm.max() > 10
    assert 1.0 < float(total) <= 8.0


def test_voxelwise_loss() -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        voxels = F.cross_entropy(model(batch[0]), (batch[0][:, 0] > 0).long(), reduction="none")
        return voxels.mean((1, 2, 3)).mean()

    assert_private(nn.Conv3d(1, 2, 3, padding=1).double(), loss, (values(3, 1, 4, 5, 6),))


def coupled_dice(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    probability = output.sigmoid()
    overlap = 2 * (probability * target).sum()
    return 1 - overlap / (probability.sum() + target.sum())


def contrastive(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    similarity = F.normalize(output) @ F.normalize(target).T
    return F.cross_entropy(similarity, torch.arange(len(output)))


def ignoring(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    label = torch.where(target[:, 0] > 0, 0, -100)
    return F.cross_entropy(output, label)


@pytest.mark.parametrize("criterion", [coupled_dice, contrastive, ignoring])
def test_criteria_that_couple_samples_are_found(criterion: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 5), torch.rand(6, 3) - 0.3
    with pytest.raises(ValueError, match="criterion couples samples"):
        PrivacyEngine().check_per_sample(nn.Linear(5, 3), criterion, (x, y))
    PrivacyEngine().check_per_sample(nn.Linear(5, 3), nn.MSELoss(), (x, y))


def test_rows_of_one_patient_are_one_sample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 2))
    assert_private(model.double(), squared_loss, (values(6, 1, 4, 4),), views_per_sample=2)
