"""Rate, steps, denominator, and samplers of one's own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from opacus.data_loader import DPDataLoader
from torch import nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dpkernels import PrivacyEngine
from tests.engine.support import (
    made_private,
    values,
)


@pytest.mark.parametrize(("count", "batch"), [(98, 1), (107, 1), (100, 64), (37, 8)])
def test_rate_steps_and_denominator(count: int, batch: int) -> None:
    model = nn.Linear(3, 2)
    engine = PrivacyEngine()
    _, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(count, 3)), batch_size=batch),
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    assert len(loader) == len(list(loader.batch_sampler)) == math.ceil(count / batch)
    assert loader.sample_rate == batch / count
    assert optimizer.expected_batch_size == batch


@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_random_rows_for_empty_batches_are_refused(poisson_sampling: bool) -> None:
    """Opacus clips such a row as if it were a record: twice the sensitivity."""
    model = nn.Linear(3, 2)
    arguments = {"module": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
                 "noise_multiplier": 1.0, "max_grad_norm": 1.0}  # fmt: skip
    plain = DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=1)
    filled = DPDataLoader.from_data_loader(plain, rand_on_empty=True)
    for given in ({"data_loader": plain, "rand_on_empty": True}, {"data_loader": filled}):
        with pytest.raises(ValueError, match="rand_on_empty=True.*leave it False"):
            PrivacyEngine().make_private(**arguments, **given, poisson_sampling=poisson_sampling)


class EveryOther(Sampler):
    def __iter__(self) -> Iterator[list[int]]:
        yield from ([0, 2], [1, 3])

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("arguments", [
    {"batch_size": 2, "sampler": WeightedRandomSampler([0.9, 0.1, 0.1, 0.1], 4)},
    {"batch_sampler": EveryOther()},
], ids=["WeightedRandomSampler", "EveryOther"])  # fmt: skip
def test_samplers_of_ones_own_are_refused_or_stated(
    arguments: dict[str, object], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    loader = DataLoader(TensorDataset(torch.randn(4, 3)), **arguments)

    def private(**kwargs: object) -> None:
        model = nn.Linear(3, 2)
        PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0, **kwargs,
        )  # fmt: skip

    with pytest.raises(ValueError, match=f"{name}.*poisson_sampling=False"):
        private()
    with pytest.warns(UserWarning, match=f"{name}.*does not hold"):
        private(poisson_sampling=False)


def test_samplers_that_draw_alike_are_taken() -> None:
    dataset = TensorDataset(torch.randn(8, 3))
    for arguments in (
        {"shuffle": True},
        {"sampler": DistributedSampler(dataset, num_replicas=2, rank=0)},
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = nn.Linear(3, 2)
            PrivacyEngine().make_private(
                module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                data_loader=DataLoader(dataset, batch_size=2, **arguments),
                noise_multiplier=1.0, max_grad_norm=1.0,
            )  # fmt: skip


def test_replicas_in_threads_are_refused() -> None:
    with pytest.raises(ValueError, match="DataParallel.*DistributedDataParallel"):
        made_private(nn.DataParallel(nn.Linear(3, 2)), values(4, 3).float())
