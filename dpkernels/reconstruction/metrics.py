"""How near a reconstruction comes to the record, and which candidate belongs to which record.

Arrays are one record each, with a leading channel axis: [C, H, W] for an image, [C, X, Y, Z] for a
volume. Stacks add an axis in front: [n, C, ...].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment

from dpkernels.accounting.checks import check_count, check_number

_WINDOW_SIGMA, _WINDOW_RADIUS = 1.5, 5
_BLOCK = 2**24


def mse(truth: np.ndarray, candidate: np.ndarray) -> float:
    """Mean squared error.

    Raises:
        ValueError: the shapes differ.
    """
    truth, candidate = _pair(truth, candidate)
    return float(np.mean((truth - candidate) ** 2))


def psnr(truth: np.ndarray, candidate: np.ndarray, *, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB; infinite for an exact copy.

    Args:
        truth, candidate: of equal shape.
        data_range: largest minus smallest possible value, > 0.

    Raises:
        ValueError: the shapes differ, or `data_range` is not positive.
    """
    data_range = check_number("data_range", data_range, above=0.0)
    error = mse(truth, candidate)
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def ssim(truth: np.ndarray, candidate: np.ndarray, *, data_range: float) -> float:
    """Structural similarity [Wang et al. 2004]: 11 x 11 Gaussian window, sigma 1.5.

    Mean over channels; of a volume, mean over the slices along its last axis. Windows that leave
    the picture are left out.

    Args:
        truth, candidate: [C, H, W] or [C, X, Y, Z].
        data_range: largest minus smallest possible value, > 0.

    Raises:
        ValueError: shapes differ, have other dimensions, or a slice is smaller than the window.
    """
    truth, candidate = _pair(truth, candidate)
    data_range = check_number("data_range", data_range, above=0.0)
    least = 2 * _WINDOW_RADIUS + 1
    if truth.ndim not in (3, 4) or min(truth.shape[1:3]) < least:
        raise ValueError(
            f"truth: shape {truth.shape}; expected [C, H, W] or [C, X, Y, Z] with slices of at "
            f"least {least} x {least}"
        )

    def local_mean(values: np.ndarray) -> np.ndarray:
        smooth = gaussian_filter(values, _WINDOW_SIGMA, radius=_WINDOW_RADIUS, axes=(1, 2))
        inside = slice(_WINDOW_RADIUS, -_WINDOW_RADIUS)
        return np.asarray(smooth[:, inside, inside])

    mean_t, mean_c = local_mean(truth), local_mean(candidate)
    var_t = local_mean(truth**2) - mean_t**2
    var_c = local_mean(candidate**2) - mean_c**2
    covariance = local_mean(truth * candidate) - mean_t * mean_c
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = ((2 * mean_t * mean_c + c1) * (2 * covariance + c2)) / (
        (mean_t**2 + mean_c**2 + c1) * (var_t + var_c + c2)
    )
    return float(similarity.mean())


def ncc(truth: np.ndarray, candidate: np.ndarray) -> float:
    """Normalised cross-correlation about the means, in [-1, 1]; 0 where one of them is constant.

    Raises:
        ValueError: the shapes differ.
    """
    truth, candidate = _pair(truth, candidate)
    return float(ncc_matrix(truth[None], candidate[None])[0, 0])


def ncc_matrix(truths: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """[n, m]: correlation of each truth [n, ...] with each candidate [m, ...]."""
    if truths.shape[1:] != candidates.shape[1:]:
        raise ValueError(
            f"candidates: shape {candidates.shape} beside truths of shape {truths.shape}; expected "
            "records of equal shape"
        )
    rows = _unit_rows(truths)
    size = max(1, _BLOCK // max(rows.shape[1], 1))
    blocks = [
        rows @ _unit_rows(candidates[start : start + size]).T
        for start in range(0, len(candidates), size)
    ]
    return np.concatenate(blocks, axis=1) if blocks else np.zeros((len(truths), 0))


@dataclass(frozen=True)
class Match:
    """A truth and the candidate that was assigned to it.

    Attributes:
        truth: index of the truth.
        candidate: index of the candidate; None where there were fewer candidates than truths.
        mse, psnr, ssim: of both clipped to the range of the data; psnr in dB.
        ncc: of the candidate as it is (a correlation needs no scale); 0 without a candidate.
    """

    truth: int
    candidate: int | None
    mse: float
    psnr: float
    ssim: float
    ncc: float


def assign(scores: np.ndarray) -> list[int | None]:
    """The one-to-one assignment of candidates to truths with the largest sum of scores.

    Args:
        scores: [truths, candidates]; larger is better.

    Returns:
        By truth, the index of its candidate; None where candidates have run out.
    """
    chosen: list[int | None] = [None] * len(scores)
    for row, column in zip(*linear_sum_assignment(scores, maximize=True)):
        chosen[int(row)] = int(column)
    return chosen


def match(
    truths: np.ndarray, candidates: np.ndarray, *, low: float = 0.0, high: float = 1.0
) -> list[Match]:
    """Assign candidates to truths one to one by correlation, and measure each pair.

    Args:
        truths: [n, C, ...], the records that were attacked.
        candidates: [m, C, ...], everything the attack offers.
        low, high: range of the data. Errors and SSIM compare truth and candidate both clipped to
            it; a truth without a candidate is compared with the middle of the range.

    Returns:
        One match for each truth, in order.
    """
    middle = np.full(truths.shape[1:], (low + high) / 2)
    scores = ncc_matrix(truths, candidates)
    found = []
    for index, chosen in enumerate(assign(scores)):
        truth = np.clip(truths[index], low, high)
        guess = middle if chosen is None else np.clip(candidates[chosen], low, high)
        found.append(
            Match(
                index,
                chosen,
                mse(truth, guess),
                psnr(truth, guess, data_range=high - low),
                ssim(truth, guess, data_range=high - low),
                0.0 if chosen is None else float(scores[index, chosen]),
            )
        )
    return found


def chance_ncc(
    truths: np.ndarray, *, candidates: int, repeats: int = 200, seed: int = 0
) -> np.ndarray:
    """What `match` finds among candidates of pure noise: the baseline of every correlation.

    Only the correlations of white noise with the truths matter, and those are normal with the
    covariance of the normalised truths over their dimension, so no noise image is drawn.

    Args:
        truths: [n, C, ...].
        candidates: number of noise candidates, >= 1.
        repeats: how often to draw.
        seed: of the draw.

    Returns:
        [repeats, n]: correlation of each truth with its assigned noise; 0 where none was left.
    """
    count, repeats = check_count("candidates", candidates), check_count("repeats", repeats)
    rows = _unit_rows(truths)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    root = vectors * np.sqrt(values.clip(0) / max(rows.shape[1] - 1, 1))
    rng = np.random.default_rng(seed)
    found = np.zeros((repeats, len(truths)))
    for row in found:
        scores = root @ rng.standard_normal((len(truths), count))
        for index, chosen in enumerate(assign(scores)):
            row[index] = 0.0 if chosen is None else scores[index, chosen]
    return found


def prior_ncc(truths: np.ndarray) -> np.ndarray:
    """[n]: correlation of each record with the mean of the others: a guess without any model.

    Raises:
        ValueError: fewer than two records.
    """
    if len(truths) < 2:
        raise ValueError(f"truths: got {len(truths)}, expected at least 2 to guess from the others")
    total = truths.sum(axis=0, dtype=np.float64)
    return np.array([ncc(one, (total - one) / (len(truths) - 1)) for one in truths])


def _pair(truth: np.ndarray, candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if truth.shape != candidate.shape:
        raise ValueError(
            f"candidate: shape {candidate.shape}, expected that of the truth, {truth.shape}"
        )
    return truth.astype(np.float64), candidate.astype(np.float64)


def _unit_rows(records: np.ndarray) -> np.ndarray:
    """[n, D], float64: centred and of length one; zero where constant or not finite."""
    rows = records.reshape(len(records), -1).astype(np.float64)
    finite = np.isfinite(rows).all(axis=1, keepdims=True)
    rows = np.where(finite, rows, 0.0)
    rows -= rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    constant = norms <= 1e-12 * math.sqrt(rows.shape[1])
    return np.where(constant, 0.0, rows / np.where(constant, 1.0, norms))
