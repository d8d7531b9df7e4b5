"""Rows and samples: who belongs to whom."""

from __future__ import annotations

import pytest
import torch

from dpkernels.layers.fold import merge_positions, rows_per_sample, sum_rows


@pytest.mark.parametrize(
    ("rows", "samples", "expected"),
    [(6, 3, 2), (3, 3, 1), (7, 3, None), (2, 3, None), (0, 3, None)],
)
def test_rows_per_sample(rows: int, samples: int, expected: int | None) -> None:
    assert rows_per_sample(rows, samples) == expected


def test_positions_of_all_rows_of_a_sample_stand_one_after_another() -> None:
    x = torch.arange(4 * 2 * 3 * 5).reshape(4, 2, 3, 5)
    merged = merge_positions(x, 2)
    assert merged.shape == (2, 12, 5)
    assert torch.equal(merged[1], torch.cat([x[2].reshape(6, 5), x[3].reshape(6, 5)]))
    assert torch.equal(merge_positions(x[:, 0, 0], 4), x[:, :1, 0])
    assert torch.equal(merge_positions(x.transpose(1, 2), 4)[0], x[0].transpose(0, 1).reshape(6, 5))


def test_gradients_of_rows_are_summed() -> None:
    rows = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(sum_rows(rows, 2), torch.stack([rows[0] + rows[1], rows[2] + rows[3]]))
    assert sum_rows(rows, 4) is rows
