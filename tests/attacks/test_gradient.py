"""The attacker's view: the gradient that the engine really releases."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dpkernels.attacks.gradient import Server
from tests.attacks.support import records, users_loss, users_model


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


def test_the_noise_is_that_of_the_mechanism_and_updates_average_it() -> None:
    """No gradient at all: what is read is noise of std sigma C, over sqrt(updates)."""
    images, model = torch.zeros(4, 50), nn.Linear(50, 80, bias=False)
    before = model.weight.clone()
    server = Server(model, noise_multiplier=1.5, max_grad_norm=0.2, batch_size=4)
    for updates in (1, 9):
        (seen,) = server.released(images, lambda out: out.mean(), [model.weight], updates)
        expected = 1.5 * 0.2 / updates**0.5
        assert seen.std().item() == pytest.approx(expected, rel=0.08), "five deviations"
        assert abs(seen.mean().item()) < 5 * expected / 4000**0.5
    assert torch.equal(model.weight, before), "the same weights are sent again and again"


def test_faulty_requests_are_named() -> None:
    model = users_model(2)
    server = Server(model, noise_multiplier=0.0, max_grad_norm=1.0, batch_size=2)
    images, read = records(2, 8, 8), list(model.parameters())
    with pytest.raises(ValueError, match="updates=0: expected an integer >= 1"):
        server.released(images, users_loss(2), read, updates=0)
    foreign = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="read: a parameter got no gradient"):
        server.released(images, users_loss(2), [foreign])
