"""Models, wrappers and private counterparts that the checks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine
from dpkernels.engine.release.optimizer import FusedDPOptimizer


class Classifier(nn.Module):
    """Layers with and without bias, one used twice, one unused; parameters of one number; a buffer
    (which DDP broadcasts at every forward)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.twice = nn.Linear(7, 7, bias=False)
        self.slope = nn.PReLU()
        self.last = nn.Linear(7, 3)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("temperature", torch.tensor(0.8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.tanh(self.first(x)))
        return self.last(self.slope(self.twice(self.twice(x)))) / self.temperature


def classifier(dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same in every process."""
    torch.manual_seed(0)
    return Classifier().to(dtype)


def data(count: int = 16, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 5, generator=generator, dtype=dtype)
    return x, torch.randint(0, 3, (count,), generator=generator)


def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def sharded(model: nn.Module, **kwargs: object) -> nn.Module:
    """Two layers sharded on their own, the rest with the root."""
    for module in model.children():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            fully_shard(module, **kwargs)
    return fully_shard(model, **kwargs)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "opacus_ddp": DifferentiallyPrivateDistributedDataParallel,
    "fsdp": sharded,
    "fsdp_kept": lambda model: sharded(model, reshard_after_forward=False),
    "fsdp_root": fully_shard,
}


def private(
    model: nn.Module,
    batch: tuple[torch.Tensor, ...],
    batch_size: int = 4,
    **kwargs: object,
) -> tuple[PrivacyEngine, nn.Module, FusedDPOptimizer, DataLoader]:
    """Engine, model, optimizer and loader, without noise unless it is asked for."""
    engine = PrivacyEngine()
    arguments: dict[str, object] = {"noise_multiplier": 0.0, "max_grad_norm": 0.3, **kwargs}
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*batch), batch_size=batch_size),
        **arguments,
    )
    return engine, *made


def own_part(batch: tuple[torch.Tensor, ...], *cuts: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """What this process has of a batch, by rank."""
    start, end = cuts[dist.get_rank()]
    return tuple(t[start:end] for t in batch)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """By the inner model's names."""
    return {
        name.replace("_module.", "").replace("module.", ""): whole(p.grad)
        for name, p in model.named_parameters()
    }


def assert_close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert actual.keys() == expected.keys(), (actual.keys(), expected.keys())
    norm = torch.sqrt(sum(g.double().square().sum() for g in expected.values()))
    assert norm > 0
    for name, gradient in expected.items():
        error = float((actual[name] - gradient).double().norm() / norm)
        assert error <= tolerance, f"{name}: relative error {error:.3g} > {tolerance:g}"


def assert_same_everywhere(tensors: Iterable[torch.Tensor]) -> None:
    """Bit for bit the same in every process."""
    flat = torch.cat([whole(t).detach().double().reshape(-1) for t in tensors])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    assert all(torch.equal(flat, other) for other in others)
