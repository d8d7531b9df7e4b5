"""The training curves: which panels there are, and what they show."""

import math

import numpy as np
import pytest
from matplotlib import pyplot as plt

from dpkernels.training import curves
from dpkernels.training.logs import COLUMNS
from dpkernels.training.privacy import PrivacyPlan


def plan(enabled: bool = True) -> PrivacyPlan:
    return PrivacyPlan(enabled, 10, 0.5, 40, 1.0, 1.0, 1, 1e-5, "tight", unit="lesion")


def table(steps: int, **columns: list[float]) -> dict[str, list[float]]:
    empty = {name: [math.nan] * steps for name in COLUMNS}
    return {**empty, "step": list(range(1, steps + 1)), **columns}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """`drawn(columns, plan)`: the axes of the picture, by title."""
    kept = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, _: kept.append(figure))

    def draw(columns, plan):
        curves.draw_progress(columns, plan, "Dice", tmp_path / "progress.png")
        return {axis.get_title(loc="left"): axis for axis in kept[-1].axes}

    yield draw
    plt.close("all")


def test_a_private_run_shows_its_budget_and_clipping(drawn):
    columns = table(3, loss=[3.0, math.nan, 1.0], epsilon=[math.nan, 1.0, 2.0])
    axes = drawn(columns, plan())
    assert list(axes) == ["Loss", "Epsilon spent (delta 1e-05)", "Share of lesions clipped"]
    (line,) = axes["Loss"].get_lines()
    assert line.get_xydata().tolist() == [[1, 3], [3, 1]]
    assert all(axis.get_xlim() == (0, 40) for axis in axes.values())


def test_a_run_without_privacy_shows_its_loss_and_its_metric(drawn):
    columns = table(3, loss=[3.0, 2.0, 1.0])
    assert list(drawn(columns, plan(False))) == ["Loss"]
    columns["validation"][1] = 0.5
    assert list(drawn(columns, plan(False))) == ["Loss", "Validation Dice"]


def test_a_long_curve_is_smoothed_without_a_shift(drawn):
    loss = [float(step) for step in range(60)]
    _, smooth = drawn(table(60, loss=loss), plan(False))["Loss"].get_lines()
    np.testing.assert_allclose(smooth.get_ydata()[5:-5], loss[5:-5], atol=1e-9)


def test_the_picture_is_a_png_and_its_figure_is_closed(tmp_path):
    before = plt.get_fignums()
    curves.draw_progress(table(2, loss=[2.0, 1.0]), plan(), "Dice", tmp_path / "progress.png")
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == before
