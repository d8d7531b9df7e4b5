"""The adversary without a prior: the noise on its best reconstruction is a known Gaussian.

From one update the optimal attacker gets X + N(0, (noise_multiplier * data_norm)^2 I) and can do
no better without prior knowledge of the record; `observations` independent updates that contain
the record average (docs/math.md, "From scratch"; Schwethelm et al., arXiv 2402.12861). Errors and
PSNR are those of this unbiased reconstruction: under much noise a blank image errs less.
"""

from __future__ import annotations

import math

from scipy.special import gammainc, gammaincinv, ndtri

from dpkernels.accounting.checks import check_count, check_number


def _checked(
    noise_multiplier: float, dimension: int, observations: float
) -> tuple[float, int, float]:
    return (
        check_number("noise_multiplier", noise_multiplier, above=0.0),
        check_count("dimension", dimension),
        check_number("observations", observations, above=0.0),
    )


def _mse_scale(
    noise_multiplier: float, dimension: int, data_norm: float, observations: float
) -> tuple[float, float]:
    """Shape and scale of the Gamma law of the mean squared error."""
    sigma, d, count = _checked(noise_multiplier, dimension, observations)
    norm = check_number("data_norm", data_norm, above=0.0)
    return d / 2, 2 * (sigma * norm) ** 2 / (count * d)


def mse_probability(
    mse: float,
    *,
    noise_multiplier: float,
    dimension: int,
    data_norm: float,
    observations: float = 1,
) -> float:
    """P(mean squared error <= mse) of the best reconstruction from scratch.

    Args:
        mse: > 0, in squared data units.
        noise_multiplier: std of the noise divided by max_grad_norm, > 0.
        dimension: number of values D in a record, >= 1.
        data_norm: Euclidean norm B of a record, > 0.
        observations: updates that contain the record, > 0.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    mse = check_number("mse", mse, above=0.0)
    shape, scale = _mse_scale(noise_multiplier, dimension, data_norm, observations)
    return float(gammainc(shape, mse / scale))


def mse_quantile(
    probability: float,
    *,
    noise_multiplier: float,
    dimension: int,
    data_norm: float,
    observations: float = 1,
) -> float:
    """The mean squared error that the best unbiased reconstruction undercuts with `probability`.

    Args:
        probability: in (0, 1).
        noise_multiplier, dimension, data_norm, observations: as in `mse_probability`.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    probability = check_number("probability", probability, above=0.0, below=1.0)
    shape, scale = _mse_scale(noise_multiplier, dimension, data_norm, observations)
    return float(gammaincinv(shape, probability)) * scale


def psnr_probability(
    psnr: float,
    *,
    noise_multiplier: float,
    dimension: int,
    data_norm: float,
    data_range: float,
    observations: float = 1,
) -> float:
    """P(PSNR >= psnr) of the best reconstruction from scratch.

    Args:
        psnr: peak signal-to-noise ratio in dB, any finite number.
        noise_multiplier, dimension, data_norm, observations: as in `mse_probability`.
        data_range: largest minus smallest possible value of the data, > 0.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    psnr = check_number("psnr", psnr)
    data_range = check_number("data_range", data_range, above=0.0)
    shape, scale = _mse_scale(noise_multiplier, dimension, data_norm, observations)
    return float(gammainc(shape, data_range**2 * 10 ** (-psnr / 10) / scale))


def psnr_quantile(
    probability: float,
    *,
    noise_multiplier: float,
    dimension: int,
    data_norm: float,
    data_range: float,
    observations: float = 1,
) -> float:
    """The PSNR in dB that the best unbiased reconstruction reaches with `probability`, in (0, 1).

    Raises:
        ValueError: naming the argument that is out of range.
    """
    data_range = check_number("data_range", data_range, above=0.0)
    mse = mse_quantile(
        probability,
        noise_multiplier=noise_multiplier,
        dimension=dimension,
        data_norm=data_norm,
        observations=observations,
    )
    return 20 * math.log10(data_range) - 10 * math.log10(mse)


def ncc_bound(*, noise_multiplier: float, dimension: int, observations: float = 1) -> float:
    """Normalised cross-correlation that a reconstruction from scratch attains, up to fluctuations.

    The value at which the correlation of the record with record plus noise concentrates when the
    whole norm of the record is signal: 1 / sqrt(1 + D sigma^2 / observations). A single
    reconstruction varies around it by about 1 / sqrt(D); see `ncc_quantile`.

    Args:
        noise_multiplier: std of the noise divided by max_grad_norm, > 0.
        dimension: number of values D in a record, >= 1.
        observations: updates that contain the record, > 0.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    sigma, d, count = _checked(noise_multiplier, dimension, observations)
    return 1 / math.hypot(1.0, sigma * math.sqrt(d / count))


def ncc_quantile(
    probability: float, *, noise_multiplier: float, dimension: int, observations: float = 1
) -> float:
    """A correlation that a reconstruction from scratch reaches with at most `probability`.

    Along the record the noise is one normal, across it a chi-square with at least D - 2 degrees of
    freedom (one is lost to the record, one to the mean); each is held to its side but for half of
    `probability` (docs/math.md, "From scratch").

    Args:
        probability: in (0, 1).
        noise_multiplier, dimension, observations: as in `ncc_bound`.

    Returns:
        In [0, 1]; 1 for two values or fewer, which two numbers determine.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    probability = check_number("probability", probability, above=0.0, below=1.0)
    sigma, d, count = _checked(noise_multiplier, dimension, observations)
    if d <= 2:
        return 1.0
    along = math.sqrt(count) / sigma - float(ndtri(probability / 2))
    across = math.sqrt(2 * float(gammaincinv((d - 2) / 2, probability / 2)))
    return 1 / math.hypot(1.0, across / along)
