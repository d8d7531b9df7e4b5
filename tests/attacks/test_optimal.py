"""The optimal attacker without prior knowledge follows the law that the bounds are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from dpkernels.attacks.optimal import linear_optimal
from dpkernels.reconstruction import ncc_bound
from dpkernels.reconstruction.metrics import match
from tests.attacks.support import records

SIGMA = 0.7


def law_errors(clip: float, generator: torch.Generator | None) -> np.ndarray:
    """Squared errors of 500 records, in units of their mean under the law."""
    images = torch.rand(500, 1, 6, 6, generator=torch.Generator().manual_seed(3)) + 0.05
    found = linear_optimal(
        images, noise_multiplier=SIGMA, max_grad_norm=clip, noise_generator=generator
    )
    norm = images.flatten(1).norm(dim=1)
    return (((found - images) ** 2).flatten(1).mean(dim=1) / (SIGMA * norm) ** 2).numpy()


@pytest.mark.parametrize("clip", [0.3, 12.0], ids=["one row", "many rows"])
def test_the_optimal_attack_follows_its_gamma_law(clip: float) -> None:
    """Clip, noise and readout in one: shape D/2, scale 2 (sigma |X|)^2 / D."""
    errors = law_errors(clip, torch.Generator().manual_seed(11))
    shape = 18.0
    law = stats.gamma(shape, scale=1 / shape)
    assert stats.kstest(errors, law.cdf).pvalue > 0.01
    assert errors.mean() == pytest.approx(1.0, abs=4 * np.sqrt(law.var() / len(errors)))
    assert errors.var() == pytest.approx(law.var(), rel=4 * np.sqrt(2.5 / len(errors)))
    for wrong in (0.95, 1.05):
        off = stats.gamma(shape, scale=wrong**2 / shape)
        assert stats.kstest(errors, off.cdf).pvalue < 1e-4, f"no power against sigma * {wrong}"


def test_the_law_holds_for_the_engines_own_generator() -> None:
    errors = law_errors(0.3, None)
    assert errors.mean() == pytest.approx(1.0, abs=6 * np.sqrt(2 / 36 / len(errors)))


def test_updates_average() -> None:
    images = records(40, 8, 8)
    common = {"noise_multiplier": SIGMA, "max_grad_norm": 0.3}
    error = {
        k: float(((linear_optimal(images, updates=k, **common) - images) ** 2).mean())
        for k in (1, 16)
    }
    assert error[1] / error[16] == pytest.approx(16, rel=0.2)


def test_a_volumes_correlation_is_the_bounds() -> None:
    """Volumes about their mean zero, so that the whole norm is signal."""
    volumes = records(6, 16, 16, 16) - 0.3
    volumes -= volumes.flatten(1).mean(dim=1).reshape(-1, 1, 1, 1, 1)
    found = linear_optimal(volumes, noise_multiplier=0.02, max_grad_norm=0.5)
    bound = ncc_bound(noise_multiplier=0.02, dimension=16**3)
    for m in match(volumes.numpy(), found.numpy(), low=-1, high=1):
        assert m.ncc == pytest.approx(bound, abs=0.05)


@pytest.mark.parametrize("clip", [0.01, 30.0])
def test_without_noise_the_optimal_attack_copies(clip: float) -> None:
    images = records(3, 12, 12)
    found = linear_optimal(images, noise_multiplier=0.0, max_grad_norm=clip)
    torch.testing.assert_close(found, images, rtol=1e-4, atol=1e-5)


def test_progress_is_reported_for_every_record() -> None:
    told: list[int] = []
    linear_optimal(
        records(5, 4, 4), noise_multiplier=1.0, max_grad_norm=1.0,
        on_progress=lambda: told.append(1),
    )  # fmt: skip
    assert len(told) == 5


def test_faulty_arguments_are_named() -> None:
    images = records(2, 12, 12)
    common = {"noise_multiplier": 0.0, "max_grad_norm": 1.0}
    with pytest.raises(ValueError, match="images: a record is zero"):
        linear_optimal(images * 0, **common)
    with pytest.raises(ValueError, match="updates=0"):
        linear_optimal(images, updates=0, **common)
    with pytest.raises(ValueError, match="noise_multiplier"):
        linear_optimal(images, noise_multiplier=-1.0, max_grad_norm=1.0)
