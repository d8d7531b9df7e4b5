import copy

import numpy as np
import pytest
import torch

from dpkernels.segmentation.data import CaseStore
from dpkernels.segmentation.layouts import read_scans
from dpkernels.segmentation.loss import build_loss
from dpkernels.segmentation.model import build_network
from dpkernels.training.privacy import (
    PrivacyPlan,
    PrivateUpdate,
    check_patients_do_not_mix,
)
from dpkernels.training.sampling import flatten_views
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
    assert statistics.clipped_fraction == pytest.approx(np.mean([norm > bound for norm in norms]))
    assert statistics.median_norm == pytest.approx(np.median(norms), rel=1e-4)


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
    with pytest.raises(ValueError, match="Statistics over the batch"):
        check_patients_do_not_mix(BatchCentred(1, 3), criterion, dataset, cpu)
