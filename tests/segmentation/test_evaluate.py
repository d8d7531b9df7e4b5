import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance
from torch import nn

from dpkernels.segmentation.config import DataConfig
from dpkernels.segmentation.data import CaseStore
from dpkernels.segmentation.evaluate import (
    CaseResult,
    Predictor,
    dice_score,
    hausdorff_95,
    measure,
    summarise,
)
from dpkernels.segmentation.layouts import read_scans


def ball(centre, radius, shape=(24, 20, 22)) -> np.ndarray:
    grid = np.indices(shape)
    return sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < radius**2


class Oracle(nn.Module):
    """Segments by intensity: class 1 between two values of the prepared image, in any mode."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.training)
        liver = ((image - 0.73).abs() < 0.05).float()
        return torch.cat([1 - liver, liver, torch.zeros_like(liver)], dim=1)


def test_dice_of_known_masks():
    a, b = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), bool)
    assert math.isnan(dice_score(a, b))
    a[0, 0, :3] = True
    assert dice_score(a, b) == 0
    b[0, 0, 1:] = True
    assert dice_score(a, b) == pytest.approx(2 * 2 / 6)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 2.0, 5.0)])
def test_surface_distance_agrees_with_monai(spacing):
    a, b = ball((10, 9, 10), 6), ball((13, 10, 11), 5) | ball((4, 4, 4), 2)
    expected = compute_hausdorff_distance(
        torch.from_numpy(a)[None, None],
        torch.from_numpy(b)[None, None],
        include_background=True,
        percentile=95,
        spacing=list(spacing),
    )
    assert hausdorff_95(a, b, spacing) == pytest.approx(float(expected), rel=1e-5)


def test_surface_distance_counts_the_border_of_the_volume_and_lacks_for_empty_masks():
    full = np.ones((4, 4, 4), bool)
    assert hausdorff_95(full, full, (1, 1, 1)) == 0
    assert math.isnan(hausdorff_95(full, np.zeros_like(full), (1, 1, 1)))


def test_absent_classes_do_not_enter_the_mean():
    nan = math.nan
    results = [
        CaseResult("a", "p", {"liver": 0.5, "cancer": nan}, {"liver": 2.0, "cancer": nan}),
        CaseResult("b", "q", {"liver": 1.0, "cancer": nan}, {"liver": nan, "cancer": nan}),
    ]
    summary = summarise(results)
    assert summary["liver"] == {"dice": 0.75, "dice_std": 0.25, "hd95": 2.0, "cases": 2}
    assert math.isnan(summary["cancer"]["dice"])
    assert summary["cancer"]["cases"] == 0
    assert summarise([]) == {}


@pytest.mark.parametrize("crop", [None, (12, 12, 12)])
def test_sliding_windows_cover_the_volume_on_its_own_grid(cohort, tiny, crop):
    """A network that looks at single voxels must see the same whatever the windows are."""
    grid = {"shape": None, "spacing": [12.0, 12.0, 12.0], "crop": list(crop)} if crop else {}
    config = tiny({"data": grid})
    store = CaseStore(read_scans(cohort), config.data, divisor=2)
    scan = store.folder.records[0]
    oracle = Oracle().train()
    predictor = Predictor(oracle, config, torch.device("cpu"))
    case = store.item(scan)
    torch.testing.assert_close(
        predictor.logits(case), Oracle()(case.image[None])[0], atol=1e-5, rtol=0
    )
    volume = store.volume(scan)
    prediction = predictor.segment(case, volume)
    result = measure(scan, volume, prediction, store.folder.labels, surface_distance=True)
    assert prediction.shape == volume.label.shape
    assert result.dice["liver"] == dice_score(prediction == 1, volume.label == 1) > 0.3
    assert result.hd95["liver"] > 0
    assert not any(oracle.modes)
    assert oracle.training


def test_preparation_is_what_the_configuration_says(cohort):
    store = CaseStore(read_scans(cohort), DataConfig(shape=(24, 16, 8)), divisor=8)
    assert store.item(store.folder.records[0]).image.shape == (1, 24, 16, 8)
