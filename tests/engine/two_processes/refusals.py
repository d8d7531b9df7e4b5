"""What several processes cannot do right is refused, in every process, with a remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine
from tests.engine.support import Tokens
from tests.engine.two_processes.models import classifier, data, loss, private, sharded


def _assert_refused(match: str, run: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=match):
        run()


def check_wrappers_that_cannot_be_right() -> None:
    def hooked() -> nn.Module:
        model = DistributedDataParallel(classifier())
        model.register_comm_hook(None, lambda state, bucket: None)
        return model

    def partly() -> nn.Module:
        model = classifier()
        fully_shard(model.first)
        return model

    def part_of_it() -> nn.Module:
        return nn.Sequential(DistributedDataParallel(nn.Linear(5, 3)))

    def hybrid() -> nn.Module:
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
        return fully_shard(classifier(), mesh=mesh)

    def ignored() -> nn.Module:
        model = classifier()
        return fully_shard(model, ignored_params={model.last.weight})

    refused = {
        "communication hook": hooked,
        "apply fully_shard to the model itself": partly,
        "wrap the whole model": part_of_it,
        "one-dimensional mesh": hybrid,
        "ignoring nothing": ignored,
    }
    for match, build in refused.items():
        _assert_refused(match, lambda build=build: private(build(), data(8)))
    model = Tokens()
    model.temperature = None  # FSDP2 shards no scalar
    fully_shard(model.patch)
    fully_shard(model)
    _assert_refused("module '\\(root\\)'.*fully_shard", lambda: private(model, data(8)))


def check_processes_that_differ() -> None:
    rank = dist.get_rank()
    _assert_refused(
        "dataset_size.*whole dataset",
        lambda: private(DistributedDataParallel(classifier()), data(8 + rank)),
    )
    _, model, optimizer, _ = private(
        DistributedDataParallel(classifier()), data(8), noise_multiplier=1.0
    )
    optimizer.noise_multiplier = 1.0 + rank
    _assert_refused("noise_multiplier.*schedulers", lambda: loss(model, data(8)).backward())


def check_records_that_could_be_drawn_twice() -> None:
    dataset = TensorDataset(*data(8))
    model = DistributedDataParallel(classifier())

    def shared() -> None:
        PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(dataset, batch_size=4, shuffle=True),
            noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=False,
        )  # fmt: skip

    _assert_refused("several times.*DistributedSampler", shared)


def check_what_shards_cannot_do() -> None:
    generator = torch.Generator().manual_seed(0)
    _assert_refused(
        "noise_generator.*same",
        lambda: private(sharded(classifier()), data(8), noise_generator=generator),
    )
    _, _, optimizer, _ = private(sharded(classifier()), data(8))
    _assert_refused("make_private_noise_only", optimizer.make_private_noise_only)


def check_weights_used_around_their_module_in_shards() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.first(x), self.second.weight)

    _, model, _, _ = private(fully_shard(Around().double()), data(8))
    _assert_refused("'second.weight'.*ordinary gradient", lambda: loss(model, data(8)).backward())


def check_an_evaluation_forward_is_not_stepped_on() -> None:
    for wrap in (DistributedDataParallel, sharded):
        _, model, optimizer, _ = private(wrap(classifier()), data(8))
        model.eval()

        def run(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            loss(model, data(8)).backward()
            optimizer.step()

        _assert_refused("eval mode|Not updated in backward", run)
