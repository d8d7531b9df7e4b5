"""Malicious layers in front of the user's model: copies without noise, chance with enough."""

from __future__ import annotations

import copy
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from dpkernels.attacks.malicious import MaliciousLayer, imprint, trap_weights
from dpkernels.reconstruction.metrics import chance_ncc, match
from tests.attacks.support import records, users_loss, users_model


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


def test_the_layer_hardly_moves_what_the_model_behind_it_sees() -> None:
    """What it adds is the rows' sum times a hundredth, along a fixed pattern of signs."""
    image = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.rand(5, 16), torch.tensor([-3.0, -5.0, -100.0, 0.5, -4.0])
    layer = MaliciousLayer(weight, bias, seed=1)
    rows = torch.relu(image.flatten(1) @ weight.T + bias).sum(1)
    added = (layer(image) - image).flatten(1)
    assert set(layer.pattern.tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(added, 0.01 * rows[:, None] * layer.pattern, rtol=1e-3, atol=1e-5)
    assert torch.equal(layer.pattern, MaliciousLayer(weight, bias, seed=1).pattern)
    assert not torch.equal(layer.pattern, MaliciousLayer(weight, bias, seed=2).pattern)


def test_a_row_that_fires_for_nobody_shows_nothing() -> None:
    images = records(2, 8, 8)
    common = {"noise_multiplier": 0.0, "max_grad_norm": 1.0}
    far = imprint(images, known_means=(100.0, 0.1), bins=7, **common)
    assert far.shape == (7, *images.shape[1:])
    assert not far.any()
    near = imprint(images, bins=7, **common)
    assert bool(near.any())
    assert bool(near.isfinite().all())


def test_trap_weights_are_twice_the_batch_and_follow_their_seed() -> None:
    images = records(3, 8, 8)
    common = {"noise_multiplier": 0.0, "max_grad_norm": 1.0}
    found, again, other = (trap_weights(images, seed=seed, **common) for seed in (0, 0, 1))
    assert len(found) == 6
    torch.testing.assert_close(found, again)
    assert not torch.allclose(found, other)


@pytest.mark.parametrize("attack", [imprint, trap_weights])
def test_faulty_arguments_are_named(attack) -> None:
    images = records(2, 12, 12)
    common = {"noise_multiplier": 0.0, "max_grad_norm": 1.0}
    with pytest.raises(ValueError, match="bins=0"):
        attack(images, bins=0, **common)
    with pytest.raises(ValueError, match="loss=None"):
        attack(images, model=users_model(2), **common)
    with pytest.raises(ValueError, match="updates=0"):
        attack(images, updates=0, **common)
