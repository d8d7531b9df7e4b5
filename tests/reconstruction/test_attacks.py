"""Attacks against the gradient that the engine releases."""

from __future__ import annotations

import copy
import importlib
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from dpkernels import attacks
from dpkernels.attacks import (
    gradient_matching,
    imprint,
    linear_optimal,
    trap_weights,
)
from dpkernels.attacks.gradient import Server
from dpkernels.reconstruction import ncc_bound
from dpkernels.reconstruction.metrics import chance_ncc, match

SIGMA = 0.7


def test_the_attacks_are_found_under_their_former_name() -> None:
    former = importlib.import_module("dpkernels.reconstruction.attacks")
    assert former.__all__ == attacks.__all__
    assert all(getattr(former, name) is getattr(attacks, name) for name in attacks.__all__)
    with pytest.raises(AttributeError, match="no attribute 'release'"):
        _ = attacks.release


def records(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Smooth blobs in [0, 1] of different brightness."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, *[max(2, n // 4) for n in shape], generator=generator)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    bright = torch.linspace(0.3, 1.0, count).reshape(-1, *[1] * (len(shape) + 1))
    return bright * nn.functional.interpolate(coarse, size=shape, mode=mode)


def users_model(dims: int) -> nn.Module:
    torch.manual_seed(0)
    conv, pool = (
        (nn.Conv2d, nn.AdaptiveAvgPool2d) if dims == 2 else (nn.Conv3d, nn.AdaptiveAvgPool3d)
    )
    return nn.Sequential(
        conv(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Sigmoid(), pool(4), nn.Flatten(),
        nn.Linear(6 * 4**dims, 3),
    )  # fmt: skip


def users_loss(count: int):
    target = torch.arange(count) % 3
    return lambda output: nn.functional.cross_entropy(output, target)


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


@pytest.mark.parametrize("shape", [(16, 16), (12, 12, 12)], ids=["image", "volume"])
@pytest.mark.parametrize("behind", [True, False], ids=["user's model", "alone"])
def test_without_noise_imprint_copies_the_whole_batch(shape: tuple[int, ...], behind: bool) -> None:
    images = records(4, *shape)
    model = users_model(len(shape)) if behind else None
    before = copy.deepcopy(model)
    found = imprint(
        images,
        noise_multiplier=0.0,
        max_grad_norm=0.1,
        model=model,
        loss=users_loss(4) if behind else None,
    )
    assert found.shape == (128, *images.shape[1:])
    assert all(m.ncc > 0.99 and m.ssim > 0.97 for m in match(images.numpy(), found.numpy()))
    if model is not None and before is not None:
        for old, new in zip(before.parameters(), model.parameters(), strict=True):
            assert torch.equal(old, new)
            assert new.grad is None


@pytest.mark.parametrize("sigma", [0.0005, 0.002])
def test_imprints_correlation_is_that_of_sigma_times_root_2k(sigma: float) -> None:
    """K rows fire for the record; the clipped gradient is spread over them (docs/math.md, 6).

    More noise also turns the sign of the bias, and with it that of the reconstruction.
    """
    volume = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, spread, norm = float(volume.mean()), float(volume.std()), float(volume.norm())
    found = imprint(
        volume,
        noise_multiplier=sigma,
        max_grad_norm=0.5,
        bins=64,
        known_means=(mean + 1e-3, 0.01),
        noise_generator=torch.Generator().manual_seed(1),
    )
    law = NormalDist(mean + 1e-3, 0.01)
    firing = sum(law.inv_cdf((i + 0.5) / 64) < mean for i in range(64))
    assert 20 < firing < 32
    expected = spread / math.hypot(spread, sigma * norm * math.sqrt(2 * firing))
    assert match(volume.numpy(), found.numpy())[0].ncc == pytest.approx(expected, abs=0.06)


def test_without_noise_trap_weights_copy_a_single_record() -> None:
    images = records(3, 16, 16)
    found = trap_weights(
        images, noise_multiplier=0.0, max_grad_norm=0.1, model=users_model(2),
        loss=users_loss(3), bins=64,
    )  # fmt: skip
    assert max(m.ncc for m in match(images.numpy(), found.numpy())) > 0.99


@pytest.mark.parametrize("attack", [imprint, trap_weights])
def test_enough_noise_leaves_chance(attack) -> None:
    images = records(4, 16, 16)
    found = attack(
        images, noise_multiplier=50.0, max_grad_norm=0.1, model=users_model(2), loss=users_loss(4)
    )
    seen = np.mean([m.ncc for m in match(images.numpy(), found.numpy())])
    chance = chance_ncc(images.numpy(), candidates=len(found), repeats=1000).mean(axis=1)
    assert seen < np.quantile(chance, 0.9999)


def test_gradient_matching_without_and_with_noise() -> None:
    images = records(1, 12, 12, seed=4)
    common = {
        "max_grad_norm": 1e3, "model": users_model(2), "loss": users_loss(1), "iterations": 300,
    }  # fmt: skip
    found = gradient_matching(images, noise_multiplier=0.0, **common)
    hidden = gradient_matching(
        images,
        noise_multiplier=1.0,
        noise_generator=torch.Generator().manual_seed(0),
        **common,
    )
    assert match(images.numpy(), found.numpy())[0].ncc > 0.9
    assert match(images.numpy(), hidden.numpy())[0].ncc < 0.5


def test_what_is_read_is_the_clipped_sum() -> None:
    """Against one sample at a time, without noise."""
    images, model = records(5, 8, 8), users_model(2)
    plain, parameters = copy.deepcopy(model), list(model.parameters())
    expected = [torch.zeros_like(p) for p in parameters]
    for index in range(5):
        output = plain(images[index : index + 1])
        loss = nn.functional.cross_entropy(output, torch.tensor([index % 3]))
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient * min(1.0, 0.2 / float(norm))
    server = Server(model, noise_multiplier=0.0, max_grad_norm=0.2, batch_size=5)
    for seen, wanted in zip(
        server.released(images, users_loss(5), parameters, updates=2), expected, strict=True
    ):
        torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-6)


def test_faulty_arguments_are_named() -> None:
    images = records(2, 12, 12)
    common = {"noise_multiplier": 0.0, "max_grad_norm": 1.0}
    with pytest.raises(ValueError, match="images: a record is zero"):
        linear_optimal(images * 0, **common)
    with pytest.raises(ValueError, match="updates=0"):
        linear_optimal(images, updates=0, **common)
    with pytest.raises(ValueError, match="bins=0"):
        imprint(images, bins=0, **common)
    with pytest.raises(ValueError, match="bins=0"):
        trap_weights(images, bins=0, **common)
    with pytest.raises(ValueError, match="loss=None"):
        imprint(images, model=users_model(2), **common)
    with pytest.raises(ValueError, match="noise_multiplier"):
        linear_optimal(images, noise_multiplier=-1.0, max_grad_norm=1.0)
