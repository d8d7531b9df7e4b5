"""Gradient matching on the user's own model."""

from __future__ import annotations

import torch

from dpkernels.attacks.inversion import gradient_matching
from dpkernels.reconstruction.metrics import match
from tests.attacks.support import records, users_loss, users_model


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


def test_a_search_repeats_by_its_seed_and_leaves_the_model_as_it_was() -> None:
    images, model, told = records(2, 8, 8), users_model(2), []
    before = [parameter.clone() for parameter in model.parameters()]

    def search(seed: int) -> torch.Tensor:
        return gradient_matching(
            images, noise_multiplier=0.0, max_grad_norm=1e3, model=model, loss=users_loss(2),
            iterations=4, seed=seed, on_progress=lambda: told.append(seed),
        )  # fmt: skip

    found, again, other = search(0), search(0), search(1)
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    assert found.shape == images.shape
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert told == [0] * 8 + [1] * 4
    assert all(map(torch.equal, before, model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())
