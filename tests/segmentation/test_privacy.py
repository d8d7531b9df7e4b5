import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import norm

from dpkernels.accounting import get_epsilon
from dpkernels.segmentation.data import CaseStore
from dpkernels.segmentation.layouts import read_scans
from dpkernels.segmentation.loss import build_loss
from dpkernels.segmentation.model import build_network
from dpkernels.training.privacy import (
    PrivacyPlan,
    PrivateUpdate,
    check_patients_do_not_mix,
    plan_privacy,
)
from dpkernels.training.report import _membership_success, build_report
from dpkernels.training.sampling import PoissonSampler, flatten_views
from dpkernels.training.store import PatientDataset

CROPS = {"shape": None, "spacing": [17.0, 17.0, 17.0], "crop": [8, 8, 8], "views_per_patient": 4}


def parts(config, cohort, patients):
    """A network, a loss of rows and a dataset over the first `patients` patients."""
    store = CaseStore(read_scans(cohort), config.data, divisor=2)
    store.read_all()
    network = build_network(config.network, in_channels=1, out_channels=3, seed=0)
    criterion = build_loss(config.loss, 3)
    names = list(store.folder.patients)
    dataset = PatientDataset([names[i] for i in patients], store, None, seed=0)
    return network.train(), lambda model, x, y: criterion(model(x), y), dataset


def everyone(dataset, bound, *, views, sigma=0.0, rate=1.0) -> PrivacyPlan:
    return PrivacyPlan(
        enabled=True,
        patients=len(dataset),
        sample_rate=rate,
        steps=10,
        noise_multiplier=sigma,
        max_grad_norm=bound,
        views_per_patient=views,
        delta=1e-5,
        accountant="tight",
    )


def released_sum(network, loss_of_rows, dataset, bound, *, views, physical=0) -> torch.Tensor:
    """What one noiseless step releases, before the division by q N: read off an SGD step."""
    network = copy.deepcopy(network)
    before = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
    plan = everyone(dataset, bound, views=views)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    PrivateUpdate(network, optimizer, dataset, plan, physical).step(loss_of_rows)
    after = torch.cat([p.detach().flatten() for p in network.parameters()])
    return (before - after) * plan.expected_batch_size


def patient_gradient(network, loss_of_rows, dataset, index) -> torch.Tensor:
    image, label = dataset[index]
    loss = loss_of_rows(network, flatten_views(image[None]), flatten_views(label[None]))
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    return torch.cat([g.flatten() for g in gradients])


def test_all_crops_of_one_patient_move_the_released_sum_by_at_most_the_bound(cohort, tiny):
    config, bound = tiny({"data": CROPS}), 0.05
    network, loss_of_rows, with_patient = parts(config, cohort, [0, 1, 2])
    without = copy.copy(with_patient)
    without.patients = with_patient.patients[:2]
    moved = released_sum(network, loss_of_rows, with_patient, bound, views=4) - released_sum(
        network, loss_of_rows, without, bound, views=4
    )
    assert float(moved.norm()) <= bound * (1 + 1e-4)
    assert float(moved.norm()) > 0.9 * bound


@pytest.mark.parametrize("physical", [0, 1, 2])
def test_views_are_averaged_then_clipped_once_whatever_the_physical_batch(cohort, tiny, physical):
    config = tiny({"data": CROPS})
    network, loss_of_rows, dataset = parts(config, cohort, [0, 1, 2])
    gradients = [patient_gradient(network, loss_of_rows, dataset, i) for i in range(3)]
    norms = torch.stack([g.norm() for g in gradients])
    bound = float(norms.median())
    assert norms.min() < bound < norms.max(), "the bound must clip some patients and not others"
    expected = sum(g * min(1.0, bound / float(g.norm())) for g in gradients)
    found = released_sum(network, loss_of_rows, dataset, bound, views=4, physical=physical)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_step_statistics_are_the_patients(cohort, tiny):
    config = tiny({"data": CROPS})
    network, loss_of_rows, dataset = parts(config, cohort, [0, 1, 2])
    norms = [float(patient_gradient(network, loss_of_rows, dataset, i).norm()) for i in range(3)]
    bound = (min(norms) + max(norms)) / 2
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    plan = everyone(dataset, bound, views=4)
    statistics = PrivateUpdate(network, optimizer, dataset, plan, 2).step(loss_of_rows)
    assert statistics.patients == 3
    assert statistics.clipped == pytest.approx(np.mean([norm > bound for norm in norms]))
    assert statistics.median_norm == pytest.approx(np.median(norms), rel=1e-4)


def test_an_empty_batch_is_a_step_of_noise_alone_and_is_counted(cohort, tiny):
    network, loss_of_rows, dataset = parts(tiny(), cohort, [0, 1])
    before = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
    plan = everyone(dataset, 0.5, views=1, sigma=2.0, rate=0.5)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    update = PrivateUpdate(network, optimizer, dataset, plan, 0)
    update._batches = iter([(torch.zeros(0, 1, 1, 16, 16, 16), torch.zeros(0, 1, 1, 16, 16, 16))])
    statistics = update.step(loss_of_rows)
    noise = before - torch.cat([p.detach().flatten() for p in network.parameters()])
    assert (statistics.patients, statistics.loss, update.steps_counted) == (0, None, 1)
    assert float(noise.std()) == pytest.approx(2.0 * 0.5 / plan.expected_batch_size, rel=0.2)


def test_sampling_and_noise_ignore_the_global_seed(cohort, tiny):
    def run() -> tuple[list[int], torch.Tensor]:
        torch.manual_seed(0)
        network, loss_of_rows, dataset = parts(tiny(), cohort, range(8))
        plan = everyone(dataset, 0.5, views=1, sigma=1.0, rate=0.5)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
        update = PrivateUpdate(network, optimizer, dataset, plan, 0)
        sizes = [update.step(loss_of_rows).patients for _ in range(12)]
        return sizes, torch.cat([p.detach().flatten() for p in network.parameters()])

    (sizes, weights), (other_sizes, other_weights) = run(), run()
    assert sizes != other_sizes, "equal by chance once in 1e8"
    assert not torch.equal(weights, other_weights)


def test_every_patient_is_drawn_at_the_sample_rate_and_alone():
    """The count of each patient, and of each pair, within five deviations of its expectation."""
    rate, draws, patients = 0.25, 4000, 8
    batches = itertools.islice(PoissonSampler(patients, rate), draws)
    taken = np.zeros((draws, patients))
    for row, batch in zip(taken, batches, strict=True):
        row[batch] = 1
    pairs = taken.T @ taken
    for observed, chance in (
        (np.diag(pairs), rate),
        (pairs[np.triu_indices(patients, 1)], rate**2),
    ):
        spread = np.sqrt(draws * chance * (1 - chance))
        assert np.abs(observed - draws * chance).max() < 5 * spread


def test_the_engine_accounts_the_rate_of_the_sampler(cohort, tiny):
    network, loss_of_rows, dataset = parts(tiny(), cohort, range(7))
    plan = everyone(dataset, 0.5, views=1, sigma=1.0, rate=2 / 7)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    update = PrivateUpdate(network, optimizer, dataset, plan, 0)
    for _ in range(3):
        update.step(loss_of_rows)
    history = update.state_dict()["accountant"]["history"]
    assert [tuple(entry) for entry in history] == [(1.0, 2 / 7, 3)]
    assert update.optimizer.expected_batch_size == 2


def test_the_plan_spends_the_target_and_no_more(tiny):
    plan = plan_privacy(tiny({"training": {"steps": 50, "batch_size": 8}}), patients=96)
    assert plan.sample_rate == 8 / 96
    assert plan.expected_batch_size == 8
    spent = get_epsilon(
        noise_multiplier=plan.noise_multiplier, sample_rate=8 / 96, steps=50, delta=1e-5
    )
    assert 0.98 * 8 < spent <= 8
    assert plan.epsilon() == spent
    assert 0 == plan.epsilon(0) < plan.epsilon(10) < plan.epsilon(50)


def test_a_given_noise_multiplier_is_kept(tiny):
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
def test_plans_that_guarantee_nothing_are_refused(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        plan_privacy(tiny(change), patients=6)


class BatchCentred(torch.nn.Module):
    """Subtracts the mean over the batch: no layer is refused by type, yet rows mix."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, image):
        return self.conv(image - image.mean(dim=0, keepdim=True))


def test_a_network_that_mixes_patients_is_refused(cohort, tiny):
    network, _, dataset = parts(tiny(), cohort, [0, 1])
    criterion = build_loss(tiny().loss, 3)
    cpu = torch.device("cpu")
    check_patients_do_not_mix(network, criterion, dataset, cpu)
    assert all(p.grad is None for p in network.parameters())
    with pytest.raises(ValueError, match="couples samples"):
        check_patients_do_not_mix(BatchCentred(1, 3), criterion, dataset, cpu)


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (4.0, 16), (0.2, 3)])
def test_the_bound_on_guessing_participation_is_the_gaussian_one_without_subsampling(sigma, steps):
    """Two Gaussians at distance mu = sqrt(T) / sigma: the best guess is right Phi(mu / 2)."""
    plan = PrivacyPlan(True, 10, 1.0, steps, sigma, 1.0, 1, 1e-5, "tight")
    exact = float(norm.cdf(np.sqrt(steps) / sigma / 2))
    found = _membership_success(plan, steps)
    assert exact <= found <= exact + 2e-3


def test_nothing_is_claimed_about_participation_when_the_noise_is_tiny():
    plan = PrivacyPlan(True, 10, 1.0, 5, 1e-4, 1.0, 1, 1e-5, "tight")
    assert _membership_success(plan, 5) == 1.0


@pytest.mark.parametrize(
    ("sigma", "words"),
    [(20.0, "a strong guarantee"), (0.6, "a weak guarantee"), (1e-4, "next to no guarantee")],
)
def test_the_report_says_what_its_budget_is_worth(tiny, sigma, words):
    plan = PrivacyPlan(True, 10, 1.0, 5, sigma, 1.0, 1, 1e-5, "tight")
    columns = {"clipped_fraction": []}
    report = build_report(tiny(), plan, 5, columns, (), (), 512)
    assert words in report.to_markdown()


def test_no_guarantee_rests_on_an_accountant_that_may_fall_below(tiny):
    with pytest.raises(ValueError, match="privacy.accountant must be tight, rdp or prv"):
        tiny({"privacy": {"accountant": "gdp"}})
