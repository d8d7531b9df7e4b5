"""Whole training loops: Poisson loaders, physical batches, accounting, checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
from opacus.schedulers import ExponentialNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dpkernels import PrivacyEngine
from tests.engine.test_examples import example
from tests.engine.two_processes.models import (
    WRAPPERS,
    assert_close,
    assert_same_everywhere,
    classifier,
    data,
    loss,
    private,
    sharded,
    whole,
)


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace("_module.", "").replace("module.", ""): whole(p).detach().clone()
        for name, p in model.named_parameters()
    }


def check_training_is_that_of_one_process() -> None:
    """Three Poisson steps in physical batches of two, replayed by one process."""
    batch = data(16)
    indexed = (*batch, torch.arange(16))
    for name, wrap in WRAPPERS.items():
        torch.manual_seed(7)
        engine, model, optimizer, loader = private(wrap(classifier()), indexed, batch_size=6)
        assert optimizer.expected_batch_size == 3
        assert len(loader) == 3
        drawn: list[list[int]] = [[]]
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=2, optimizer=optimizer
        ) as physical:
            for x, y, index in physical:
                optimizer.zero_grad()
                loss(model, (x, y)).backward()
                drawn[-1].extend(index.tolist())
                if optimizer.is_last_physical_batch():
                    drawn.append([])
                optimizer.step()
        drawn.pop()
        everyone: list[list[list[int]]] = [[], []]
        dist.all_gather_object(everyone, drawn)
        assert [len(steps) for steps in everyone] == [3, 3], name
        assert engine.accountant.history == [(0.0, 6 / 16, 3)]
        assert_same_everywhere(model.parameters())

        _, alone, one, _ = private(classifier(), batch, batch_size=6)
        for step in range(3):
            one.zero_grad()
            union = sorted(everyone[0][step] + everyone[1][step])
            loss(alone, tuple(t[union] for t in batch)).backward()
            one.step()
        assert_close(_parameters(model), _parameters(alone), 1e-9)


def check_noisy_training_keeps_replicas_together() -> None:
    batch = data(16, torch.float32)
    for wrap in (DistributedDataParallel, sharded):
        engine, model, optimizer, loader = private(
            wrap(classifier(torch.float32)), batch, noise_multiplier=1.0
        )
        scheduler = ExponentialNoise(optimizer, gamma=0.9)
        before = _parameters(model)
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                loss(model, (x, y)).backward()
                optimizer.step()
            scheduler.step()
        assert engine.accountant.history == [(1.0, 0.25, 4), (0.9, 0.25, 4)]
        assert_same_everywhere(model.parameters())
        assert any(not torch.equal(before[n], p) for n, p in _parameters(model).items())


def check_poisson_batches_of_each_process() -> None:
    """Shares are disjoint, empty batches are yielded, processes draw from streams of their own."""
    records = 100
    for batch_size, steps in ((1, 100), (20, 5)):
        torch.manual_seed(11)
        model = DistributedDataParallel(nn.Linear(1, 1))
        _, _, optimizer, loader = private(
            model, (torch.arange(float(records))[:, None],), batch_size=batch_size
        )
        assert abs(optimizer.expected_batch_size - batch_size / 2) < 1e-9
        batches = list(loader.batch_sampler)
        assert len(batches) == len(loader) == steps
        drawn = sum(len(b) for b in batches)
        expected = steps * batch_size / 2
        assert abs(drawn - expected) < 5 * expected**0.5
        assert batch_size > 1 or any(not b for b in batches)
        everyone: list[list[list[int]]] = [[], []]
        dist.all_gather_object(everyone, batches)
        first, second = ({record for b in side for record in b} for side in everyone)
        assert not first & second
        # records are dealt out in turn: were the streams the same, so would be their places
        dealt = torch.randperm(records, generator=torch.Generator().manual_seed(0)).tolist()
        places = [[{dealt.index(r) // 2 for r in b} for b in side] for side in everyone]
        assert places[0] != places[1]


def check_the_batch_of_a_distributed_sampler_is_a_share() -> None:
    dataset = TensorDataset(*data(16))
    for poisson in (True, False):
        sampler = DistributedSampler(dataset)
        engine = PrivacyEngine()
        model = DistributedDataParallel(classifier())
        private_model, optimizer, loader = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(dataset, batch_size=2, sampler=sampler),
            noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=poisson,
        )  # fmt: skip
        assert optimizer.expected_batch_size == 2
        assert len(loader) == 4
        for x, y in loader:
            optimizer.zero_grad()
            loss(private_model, (x, y)).backward()
            optimizer.step()
        assert engine.accountant.history == [(1.0, 0.25, 4)]


def check_processes_start_from_the_first_ones_parameters() -> None:
    model = DistributedDataParallel(classifier(), process_group=dist.new_group([0, 1]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(dist.get_rank())
    _, made, _, _ = private(model, data(8))
    assert_same_everywhere(made.parameters())
    assert_close(_parameters(made), dict(classifier().named_parameters()), 0.0)


def check_checkpoints() -> None:
    """DDP: the first process's file loads everywhere. FSDP2: a file for each process's shards."""
    batch = data(8)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    for wrap, writers in ((DistributedDataParallel, 1), (sharded, 2)):

        def build(wrap: Callable[[nn.Module], nn.Module] = wrap) -> tuple:
            return private(wrap(classifier()), batch, noise_multiplier=1.0)

        path = f"{folder[0]}/{wrap.__name__}-{dist.get_rank() % writers}.pt"
        engine, model, optimizer, _ = build()
        loss(model, batch).backward()
        optimizer.step()
        if dist.get_rank() < writers:
            engine.save_checkpoint(path=path, module=model, optimizer=optimizer)
        dist.barrier()
        resumed, other, resumed_optimizer, _ = build()
        resumed.load_checkpoint(path=path, module=other, optimizer=resumed_optimizer)
        assert resumed.accountant.history == engine.accountant.history == [(1.0, 0.5, 1)]
        assert_close(_parameters(other), _parameters(model), 0.0)
        assert_same_everywhere(other.parameters())


def check_the_example_trains() -> None:
    for fsdp in (False, True):
        accuracy, engine = example("ddp").main(epochs=2, fsdp=fsdp)
        assert accuracy > 0.8
        ((_, rate, steps),) = engine.accountant.history
        assert (rate, steps) == (0.1, 20)
