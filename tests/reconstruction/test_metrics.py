from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from dpkernels.reconstruction import metrics

RNG = np.random.default_rng(0)


def skimage_ssim(truth: np.ndarray, candidate: np.ndarray, data_range: float) -> float:
    return float(
        structural_similarity(
            truth,
            candidate,
            data_range=data_range,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


@pytest.mark.parametrize("shape", [(1, 20, 24), (3, 16, 11), (1, 18, 15, 6), (2, 12, 13, 3)])
def test_ssim_is_scikit_images_over_channels_and_slices(shape: tuple[int, ...]) -> None:
    truth, noise = RNG.random(shape), RNG.standard_normal(shape)
    candidate = truth + 0.2 * noise
    slices = [(t, c) for t, c in zip(truth, candidate, strict=True)]
    if len(shape) == 4:
        slices = [(t[..., k], c[..., k]) for t, c in slices for k in range(shape[-1])]
    expected = np.mean([skimage_ssim(t, c, 2.0) for t, c in slices])
    assert metrics.ssim(truth, candidate, data_range=2.0) == pytest.approx(expected, rel=1e-9)


def test_pixel_errors_and_correlation() -> None:
    truth = RNG.random((1, 12, 12))
    candidate = truth + 0.1
    assert metrics.mse(truth, candidate) == pytest.approx(0.01)
    assert metrics.psnr(truth, candidate, data_range=2.0) == pytest.approx(10 * math.log10(400))
    assert metrics.psnr(truth, truth, data_range=1.0) == math.inf
    other = RNG.random((1, 12, 12))
    expected = np.corrcoef(truth.ravel(), other.ravel())[0, 1]
    assert metrics.ncc(truth, other) == pytest.approx(expected)
    assert metrics.ncc(truth, -3 * truth + 1) == pytest.approx(-1)
    assert metrics.ncc(truth, np.ones_like(truth)) == 0


def test_correlations_in_blocks_are_those_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    truths, candidates = RNG.random((3, 1, 5, 5)), RNG.random((7, 1, 5, 5))
    whole = metrics.ncc_matrix(truths, candidates)
    monkeypatch.setattr(metrics, "_BLOCK", 50)
    np.testing.assert_allclose(metrics.ncc_matrix(truths, candidates), whole)
    assert whole[1, 2] == pytest.approx(metrics.ncc(truths[1], candidates[2]))


def test_matching_is_one_to_one_and_the_best_for_all_together() -> None:
    """Greedy matching would give candidate 0 to truth 0 and leave truth 1 with nothing."""
    assert metrics.assign(np.array([[0.9, 0.8], [0.85, 0.0]])) == [1, 0]
    assert metrics.assign(np.array([[0.5], [0.9]])) == [None, 0]


def test_match_finds_the_records_among_noise() -> None:
    truths = RNG.random((4, 1, 12, 12))
    noise = RNG.standard_normal((9, 1, 12, 12))
    candidates = np.concatenate([noise, truths[[2, 0, 3, 1]] + 0.01 * noise[:4]])
    found = metrics.match(truths, candidates)
    assert [m.candidate for m in found] == [10, 12, 9, 11]
    assert all(m.ncc > 0.99 and m.ssim > 0.95 and m.psnr > 35 for m in found)


def test_errors_compare_what_is_clipped_to_the_range_of_the_data() -> None:
    truth = np.zeros((1, 1, 12, 12))
    truth[..., :6] = 1.0
    (found,) = metrics.match(truth, 1000 * truth - 300)
    assert found.mse == 0
    assert found.ncc == pytest.approx(1)


def test_a_truth_without_a_candidate_counts_as_not_found() -> None:
    truths = RNG.random((2, 1, 12, 12))
    lost, kept = metrics.match(truths, truths[1:])
    assert (lost.candidate, lost.ncc, kept.candidate) == (None, 0.0, 0)
    assert lost.mse == pytest.approx(metrics.mse(truths[0], np.full_like(truths[0], 0.5)))


def test_chance_is_what_matched_noise_gives() -> None:
    """Against noise images that are really drawn; the truths are correlated with each other."""
    truths = RNG.random((1, 1, 16, 16)) + 0.5 * RNG.random((3, 1, 16, 16))
    fast = metrics.chance_ncc(truths, candidates=20, repeats=400)
    drawn = []
    for _ in range(400):
        scores = metrics.ncc_matrix(truths, RNG.standard_normal((20, 1, 16, 16)))
        drawn.append([scores[i, j] for i, j in enumerate(metrics.assign(scores)) if j is not None])
    assert fast.mean() == pytest.approx(np.mean(drawn), rel=0.05)
    assert fast.std() == pytest.approx(np.std(drawn), rel=0.15)


def test_guessing_from_the_other_records() -> None:
    common = RNG.random((1, 1, 16, 16))
    alike = common + 0.05 * RNG.random((5, 1, 16, 16))
    assert metrics.prior_ncc(alike).min() > 0.95
    assert abs(metrics.prior_ncc(RNG.random((5, 1, 64, 64)))).max() < 0.1


def test_faulty_arguments_are_named() -> None:
    image = np.zeros((1, 12, 12))
    with pytest.raises(ValueError, match="candidate: shape"):
        metrics.mse(image, image[:, :5])
    with pytest.raises(ValueError, match="data_range"):
        metrics.psnr(image, image, data_range=0.0)
    with pytest.raises(ValueError, match="11 x 11"):
        metrics.ssim(image[:, :10], image[:, :10], data_range=1.0)
    with pytest.raises(ValueError, match="truths: got 1"):
        metrics.prior_ncc(image[None])
    with pytest.raises(ValueError, match="candidates: shape"):
        metrics.ncc_matrix(image[None], image[None, :, :5])
