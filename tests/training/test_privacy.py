"""The privacy of a run: the plan's noise, one clip for each patient, every step counted."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dpkernels.accounting import get_epsilon
from dpkernels.training.privacy import (
    PlainUpdate,
    PrivacyPlan,
    PrivateUpdate,
    check_patients_do_not_mix,
    plan_privacy,
)
from dpkernels.training.processes import TrainingProcesses
from dpkernels.training.sampling import flatten_views
from tests.training.toy import FEATURES, ToyViews, tiny

VIEWS = 3


def parts(patients: int):
    """A network, a loss of rows and a data set of so many patients."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 2)).train()
    loss = nn.CrossEntropyLoss()
    dataset = ToyViews([f"p{index}" for index in range(patients)], VIEWS)
    return network, lambda model, image, label: loss(model(image), label), dataset


def everyone(dataset, bound, *, sigma=0.0, rate=1.0, seed=None) -> PrivacyPlan:
    return PrivacyPlan(True, len(dataset), rate, 10, sigma, bound, VIEWS, 1e-5, "tight", seed)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().clone() for tensor in tensors])


def gradient_of(network, loss_of_rows, *rows) -> torch.Tensor:
    loss = loss_of_rows(network, *map(flatten_views, rows))
    return flat(torch.autograd.grad(loss, list(network.parameters())))


@pytest.mark.parametrize("physical", [0, 1, 2])
def test_views_are_averaged_then_clipped_once_whatever_the_physical_batch(physical):
    """What one noiseless step releases, read off an SGD step, against one patient at a time."""
    network, loss_of_rows, dataset = parts(5)
    patients = [[part[None] for part in dataset[index]] for index in range(5)]
    gradients = [gradient_of(network, loss_of_rows, *rows) for rows in patients]
    norms = [float(gradient.norm()) for gradient in gradients]
    bound = sum(sorted(norms)[2:4]) / 2  # clips two of the five
    expected = sum(g * min(1.0, bound / n) for g, n in zip(gradients, norms, strict=True))
    before = flat(network.parameters())
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    plan = everyone(dataset, bound)
    statistics = PrivateUpdate(network, optimizer, dataset, plan, physical).step(loss_of_rows)
    found = (before - flat(network.parameters())) * plan.expected_batch_size
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (statistics.patients, statistics.clipped_fraction) == (5, pytest.approx(2 / 5))
    assert statistics.median_norm == pytest.approx(np.median(norms), rel=1e-4)


def test_an_empty_batch_is_a_step_of_noise_alone_and_is_counted():
    _, loss_of_rows, dataset = parts(2)
    network = nn.Linear(FEATURES, 1000)
    before = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
    plan = everyone(dataset, 0.5, sigma=2.0, rate=0.5)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    update = PrivateUpdate(network, optimizer, dataset, plan, 0)
    update._batches = iter([(torch.zeros(0, VIEWS, FEATURES), torch.zeros(0, VIEWS))])
    statistics = update.step(loss_of_rows)
    noise = before - torch.cat([p.detach().flatten() for p in network.parameters()])
    assert (statistics.patients, statistics.loss, update.steps_counted) == (0, None, 1)
    assert float(noise.std()) == pytest.approx(2.0 * 0.5 / plan.expected_batch_size, rel=0.1)


def test_sampling_and_noise_ignore_the_global_seed():
    def run() -> tuple[list[int], torch.Tensor]:
        torch.manual_seed(0)
        network, loss_of_rows, dataset = parts(8)
        plan = everyone(dataset, 0.5, sigma=1.0, rate=0.5)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
        update = PrivateUpdate(network, optimizer, dataset, plan, 0)
        sizes = [update.step(loss_of_rows).patients for _ in range(12)]
        return sizes, torch.cat([p.detach().flatten() for p in network.parameters()])

    (sizes, weights), (other_sizes, other_weights) = run(), run()
    assert sizes != other_sizes, "equal by chance once in 1e8"
    assert not torch.equal(weights, other_weights)


def test_the_engine_accounts_the_rate_of_the_sampler():
    network, loss_of_rows, dataset = parts(7)
    plan = everyone(dataset, 0.5, sigma=1.0, rate=2 / 7)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    update = PrivateUpdate(network, optimizer, dataset, plan, 0)
    for _ in range(3):
        update.step(loss_of_rows)
    history = update.state_dict()["accountant"]["history"]
    assert [tuple(entry) for entry in history] == [(1.0, 2 / 7, 3)]
    assert update.optimizer.expected_batch_size == 2


def test_the_plan_spends_the_target_and_no_more():
    plan = plan_privacy(tiny({"training": {"steps": 50, "batch_size": 8}}), patients=96)
    assert plan.sample_rate == 8 / 96
    assert plan.expected_batch_size == 8
    spent = get_epsilon(
        noise_multiplier=plan.noise_multiplier, sample_rate=8 / 96, steps=50, delta=1e-5
    )
    assert 0.98 * 8 < spent <= 8
    assert plan.epsilon() == spent
    assert 0 == plan.epsilon(0) < plan.epsilon(10) < plan.epsilon(50)


def test_a_given_noise_multiplier_is_kept():
    config = tiny({"privacy": {"epsilon": None, "noise_multiplier": 1.25}})
    assert plan_privacy(config, patients=6).noise_multiplier == 1.25
    off = plan_privacy(tiny({"privacy": {"enabled": False}}), patients=6)
    assert (off.noise_multiplier, off.epsilon()) == (0.0, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"batch_size": 7}}, "training.batch_size must be at most the 6 training"),
        ({"privacy": {"delta": 0.2}}, "privacy.delta must be below 1 / 6 training patients"),
    ],
)
def test_plans_that_guarantee_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan_privacy(tiny(change), patients=6)


def test_a_fixed_seed_repeats_noise_and_sampling():
    def weights(seed: int) -> torch.Tensor:
        network, loss_of_rows, dataset = parts(6)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        plan = everyone(dataset, 0.5, sigma=1.0, rate=0.5, seed=seed)
        update = PrivateUpdate(network, optimizer, dataset, plan, 0)
        for _ in range(3):
            update.step(loss_of_rows)
        return flat(network.parameters())

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_lost_steps_are_counted_and_survive_a_checkpoint():
    network, loss_of_rows, dataset = parts(4)
    plan = everyone(dataset, 0.5, sigma=1.0, rate=0.5)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    update = PrivateUpdate(network, optimizer, dataset, plan, 0)
    update.step(loss_of_rows)
    update.count_lost_steps(3)
    other, *_ = parts(4)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    again = PrivateUpdate(other, optimizer, dataset, plan, 0)
    again.load_state_dict(copy.deepcopy(update.state_dict()))
    assert again.steps_counted == update.steps_counted == 4
    assert again.optimizer.state_dict()["state"].keys() == {0, 1, 2, 3}


def test_a_stored_plan_that_differs_is_said_field_by_field():
    plan = PrivacyPlan(True, 10, 0.5, 6, 1.0, 1.0, 1, 1e-5, "tight")
    assert plan.differences(plan.to_dict()) == []
    stored = {**plan.to_dict(), "delta": 1e-4}
    del stored["unit"]
    assert plan.differences(stored) == [
        "delta: the run was started with 0.0001, now 1e-05",
        "unit: the run was started with None, now 'patient'",
    ]


@pytest.mark.parametrize("physical", [0, 1, 3])
def test_without_privacy_a_step_is_that_of_the_whole_batch(physical):
    network, loss_of_rows, dataset = parts(4)
    images, labels = map(torch.stack, zip(*(dataset[index] for index in range(4)), strict=True))
    expected = flat(network.parameters()) - gradient_of(network, loss_of_rows, images, labels)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    plan = PrivacyPlan(False, 4, 1.0, 10, 0.0, 1.0, VIEWS, 1e-5, "tight")
    update = PlainUpdate(network, optimizer, dataset, plan, physical)
    loss = loss_of_rows(network, flatten_views(images), flatten_views(labels)).item()
    statistics = update.step(loss_of_rows)
    torch.testing.assert_close(flat(network.parameters()), expected, rtol=1e-4, atol=1e-5)
    assert statistics.loss == pytest.approx(loss, rel=1e-5)
    assert (statistics.patients, statistics.clipped_fraction, update.steps_counted) == (4, None, 1)


def test_without_privacy_an_empty_batch_moves_nothing_and_is_counted():
    network, loss_of_rows, dataset = parts(2)
    plan = PrivacyPlan(False, 2, 0.5, 10, 0.0, 1.0, VIEWS, 1e-5, "tight")
    update = PlainUpdate(network, torch.optim.SGD(network.parameters(), lr=1.0), dataset, plan, 0)
    update._batches = iter([(torch.zeros(0, VIEWS, FEATURES), torch.zeros(0, VIEWS))])
    before = flat(network.parameters())
    assert update.step(loss_of_rows).patients == 0
    assert torch.equal(flat(network.parameters()), before)
    update.count_lost_steps(2)
    assert update.steps_counted == update.state_dict()["steps"] == 3


def test_several_processes_train_with_privacy_only():
    network, _, dataset = parts(2)
    plan = PrivacyPlan(False, 2, 0.5, 10, 0.0, 1.0, VIEWS, 1e-5, "tight")
    with pytest.raises(ValueError, match="--non-private: 2 processes train together"):
        PlainUpdate(
            network, torch.optim.SGD(network.parameters(), lr=1.0), dataset, plan, 0,
            TrainingProcesses(0, 2),
        )  # fmt: skip


class BatchCentred(nn.Module):
    """Subtracts the mean over the batch."""

    def forward(self, image):
        return image - image.mean(dim=0, keepdim=True)


def test_a_network_that_mixes_patients_is_refused_before_the_first_step():
    network, _, dataset = parts(2)
    cpu, loss = torch.device("cpu"), nn.CrossEntropyLoss()
    check_patients_do_not_mix(network, loss, dataset, cpu)
    assert all(p.grad is None for p in network.parameters())
    with pytest.raises(ValueError, match="Statistics over the batch"):
        check_patients_do_not_mix(
            nn.Sequential(BatchCentred(), nn.Linear(FEATURES, 2)), loss, dataset, cpu
        )


class Broadcasting(nn.Module):
    """Compares every output [B, 1] with every label [B]."""

    def forward(self, output, label):
        return (output[:, :1] - label).square().mean()


def test_a_loss_that_mixes_labels_is_refused_before_the_first_step():
    network, _, dataset = parts(2)
    with pytest.raises(ValueError, match="criterion couples samples"):
        check_patients_do_not_mix(network, Broadcasting(), dataset, torch.device("cpu"))
