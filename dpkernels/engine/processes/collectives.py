"""Training in several processes: the sums exchanged, and the process that draws the noise.

Each process draws its own samples, so norms, clip factors and clipped sums are local. The clipped
sum is exchanged, on the last physical batch of a logical step (docs/architecture.md).

With replicas (DDP) the first process draws the noise, into its own sum before the all-reduce: the
released gradient is then the one-process mechanism to the letter, a seeded generator included, and
no privacy hangs on the other processes' random numbers. With shards (FSDP2) each process draws for
the shard that it keeps, after the reduce-scatter: shards are disjoint, so every coordinate gets one
draw. Each process has a key of its own from the operating system, and no key leaves its process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample import AbstractGradSampleModule
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

#: bytes that one collective exchanges at most; a larger tensor crosses alone
_BUCKET_BYTES = 64 * 2**20

#: newer versions of torch renamed reduce_scatter_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Processes:
    """One process: nothing is exchanged. Subclasses override the exchanges of several processes."""

    rank = 0
    world_size = 1

    def own_noise(self, std: float) -> float:
        """Std of this process's noise on its own sum, where the noise has std `std` in total."""
        return std

    def shard_noise(self, std: float) -> float:
        """Std of this process's noise on the result of :meth:`reduce`, for `std` in total."""
        return 0.0

    def reduce(self, sums: dict[nn.Parameter, torch.Tensor]) -> dict[nn.Parameter, torch.Tensor]:
        """By parameter, the sum over processes: whole, or the shard that this process keeps."""
        return sums

    def earlier(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """This process's part of ``parameter.grad``, the sum of the parts of all processes."""
        return parameter.grad

    def gradient(self, parameter: nn.Parameter, total: torch.Tensor) -> torch.Tensor:
        """The new ``parameter.grad``, from `total`, the parameter's result of :meth:`reduce`."""
        return total.to(parameter.dtype)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a small tensor over processes."""
        return tensor

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over processes."""
        return list(values)

    def agree(self, *, bound: float = 0.0, **values: float) -> float:
        """The largest `bound` of any process.

        Raises:
            ValueError: one of the other values differs between processes; every process raises.
        """
        return bound

    def adopt(self, module: nn.Module) -> None:
        """Start from the same parameters everywhere."""

    def check_generator(self, generator: torch.Generator | None) -> None:
        """Raise where a seeded generator would draw the same noise twice."""

    def check_noise_only(self) -> None:
        """Raise where a step without a forward pass would leave other processes waiting."""


class _Group(Processes):
    """Several processes.

    Args:
        group: the process group, None for the default one.
        device: the device on which the group's collectives run.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        self.group = None if group is dist.group.WORLD else group
        self.device = device
        self.rank = dist.get_rank(self.group)
        self.world_size = dist.get_world_size(self.group)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        shared = tensor.to(self.device, copy=True)
        dist.all_reduce(shared, group=self.group)
        return shared.to(tensor.device)

    def largest(self, values: Sequence[float]) -> list[float]:
        shared = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.group)
        return shared.tolist()

    def agree(self, *, bound: float = 0.0, **values: float) -> float:
        found = self.largest([*values.values(), *(-v for v in values.values()), bound])
        for index, (name, own) in enumerate(values.items()):
            largest, smallest = found[index], -found[index + len(values)]
            if largest != smallest:
                raise ValueError(
                    f"{name}={own}: it is between {smallest} and {largest} on the {self.world_size}"
                    " processes, expected the same on all. Build model, optimizer and data loader "
                    "alike on every process, over the whole dataset, and step schedulers together"
                )
        return found[-1]

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise ValueError(
                "process group: an optimizer of a group that is not the default one cannot be "
                "copied or pickled; save its state_dict()"
            )
        return self.__dict__


class Replicas(_Group):
    """Every process holds the whole model: clipped sums are all-reduced."""

    def own_noise(self, std: float) -> float:
        return std if self.rank == 0 else 0.0

    def reduce(self, sums: dict[nn.Parameter, torch.Tensor]) -> dict[nn.Parameter, torch.Tensor]:
        for bucket in _buckets(sums):
            tensors = list(bucket.values())
            flat = torch.cat([t.reshape(-1) for t in tensors])
            dist.all_reduce(flat, group=self.group)
            _unpack(flat, tensors)
        return sums

    def earlier(self, parameter: nn.Parameter) -> torch.Tensor | None:
        return parameter.grad if self.rank == 0 else None

    def adopt(self, module: nn.Module) -> None:
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.data, source, group=self.group)


class Shards(_Group):
    """Every process holds a shard of each parameter: clipped sums are reduce-scattered."""

    def __init__(self, module: nn.Module):
        super().__init__(_mesh_of(module).get_group(), next(module.parameters()).device)

    def own_noise(self, std: float) -> float:
        return 0.0

    def shard_noise(self, std: float) -> float:
        return std

    def reduce(self, sums: dict[nn.Parameter, torch.Tensor]) -> dict[nn.Parameter, torch.Tensor]:
        reduced: dict[nn.Parameter, torch.Tensor] = {}
        for bucket in _buckets(sums):
            parts = [self._parts(p, total) for p, total in bucket.items()]
            rows = [torch.cat([shard.reshape(-1) for shard in shards]) for shards in zip(*parts)]
            flat = pad_sequence(rows, batch_first=True)
            own = flat.new_empty(flat.shape[1])
            _reduce_scatter(own, flat.reshape(-1), group=self.group)
            shards = [own.new_empty(part[self.rank].shape) for part in parts]
            _unpack(own, shards)
            reduced.update(zip(bucket, shards))
        return reduced

    def earlier(self, parameter: nn.Parameter) -> torch.Tensor | None:
        if parameter.grad is None:
            return None
        shard = _as_sharded(parameter.grad).to_local()
        whole = torch.zeros(parameter.shape, dtype=shard.dtype, device=shard.device)
        self._parts(parameter, whole)[self.rank].copy_(shard)
        return whole

    def gradient(self, parameter: nn.Parameter, total: torch.Tensor) -> torch.Tensor:
        held = _as_sharded(parameter)
        return DTensor.from_local(
            total.to(parameter.dtype), held.device_mesh, held.placements,
            run_check=False, shape=held.shape, stride=held.stride(),
        )  # fmt: skip

    def check_generator(self, generator: torch.Generator | None) -> None:
        if generator is not None:
            raise ValueError(
                "noise_generator: with FSDP each process draws the noise of its own shards, and "
                "generators of one seed would draw the same for all; leave noise_generator=None "
                "(every process then has a key of its own from the operating system)"
            )

    def check_noise_only(self) -> None:
        raise ValueError(
            "make_private_noise_only(): with FSDP the other processes' forward passes wait for "
            "this one; run the forward and backward pass on the empty batch instead"
        )

    def _parts(self, parameter: nn.Parameter, whole: torch.Tensor) -> list[torch.Tensor]:
        """By process, its shard of `whole`: views."""
        (placement,) = _as_sharded(parameter).placements
        dim = placement.dim  # type: ignore[attr-defined]
        parts = list(whole.chunk(self.world_size, dim))
        return parts + [whole.narrow(dim, 0, 0)] * (self.world_size - len(parts))


def _buckets(
    sums: Mapping[nn.Parameter, torch.Tensor],
) -> Iterator[dict[nn.Parameter, torch.Tensor]]:
    """The sums in order, in buckets of one dtype and device, up to ``_BUCKET_BYTES`` each."""
    kinds: dict[Any, dict[nn.Parameter, torch.Tensor]] = {}
    filled: dict[Any, int] = {}
    for parameter, total in sums.items():
        kind = (total.dtype, total.device)
        size = total.numel() * total.element_size()
        if kinds.get(kind) and filled[kind] + size > _BUCKET_BYTES:
            yield kinds.pop(kind)
            filled[kind] = 0
        kinds.setdefault(kind, {})[parameter] = total
        filled[kind] = filled.get(kind, 0) + size
    yield from kinds.values()


def _unpack(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Copy the values of `flat`, which lie one tensor after the other, into the tensors."""
    packed = flat[: sum(t.numel() for t in tensors)].split([t.numel() for t in tensors])
    for tensor, values in zip(tensors, packed):
        tensor.copy_(values.view(tensor.shape))


def _as_sharded(tensor: Any) -> DTensor:
    if not isinstance(tensor, DTensor):
        raise ValueError(f"parameter of shape {tuple(tensor.shape)}: expected a sharded one")
    return tensor


def _mesh_of(module: nn.Module) -> Any:
    """The one mesh of an FSDP2 model; refuses placements that clipped sums cannot follow."""
    mesh = None
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            reason = "it is not sharded: apply fully_shard to the model itself, ignoring nothing"
        elif parameter.device_mesh.ndim != 1 or not isinstance(parameter.placements[0], Shard):
            reason = (
                f"it is placed {parameter.placements} on a mesh of {parameter.device_mesh.ndim} "
                "dimensions; expected fully_shard over a one-dimensional mesh (no hybrid sharding, "
                "no tensor parallelism)"
            )
        elif mesh is not None and parameter.device_mesh != mesh:
            reason = "it has another mesh than the others; expected one mesh for the whole model"
        elif parameter.device_mesh.device_type != parameter.to_local().device.type:
            reason = "it is offloaded to another device; drop CPUOffloadPolicy"
        else:
            mesh = parameter.device_mesh
            continue
        raise ValueError(f"module: parameter {name!r}: {reason}")
    if mesh is None:
        raise ValueError("module: it has no parameters to shard")
    return mesh


#: wrappers that are refused, with the reason and the remedy
_REFUSED = {
    nn.DataParallel: "it runs replicas of the model in threads; use DistributedDataParallel",
    FullyShardedDataParallel: (
        "it flattens parameters, so their gradients cannot be told apart; use "
        "torch.distributed.fsdp.fully_shard"
    ),
}
_WRAPPERS = (DistributedDataParallel, DifferentiallyPrivateDistributedDataParallel)


def processes_of(module: nn.Module) -> Processes:
    """The processes that train `module` together, told by its wrapper.

    Args:
        module: the model as the user wrapped it: DDP, Opacus' own DDP, ``fully_shard``, or none;
            also a model that was made private before.

    Raises:
        ValueError: the wrapper, or a setting of the wrapper, is not supported; with the remedy.
    """
    module = module._module if isinstance(module, AbstractGradSampleModule) else module
    for kind, reason in _REFUSED.items():
        if any(isinstance(m, kind) for m in module.modules()):
            raise ValueError(f"module: {kind.__name__}: {reason}")
    if any(isinstance(m, _WRAPPERS) for m in module.modules() if m is not module):
        raise ValueError("module: a part of it is wrapped in DDP; wrap the whole model instead")
    if isinstance(module, DistributedDataParallel):
        _check_ddp(module)
        return Replicas(module.process_group, next(module.parameters()).device)
    if isinstance(module, DifferentiallyPrivateDistributedDataParallel):
        return Replicas(None, next(module.parameters()).device)
    if isinstance(module, FSDPModule):
        return Shards(module)  # type: ignore[arg-type]
    if any(isinstance(p, DTensor) for p in module.parameters()):
        raise ValueError(
            "module: some of its parameters are sharded; apply fully_shard to the model itself too"
        )
    return Processes()


def _check_ddp(module: DistributedDataParallel) -> None:
    if module.mixed_precision is not None:
        raise ValueError(
            "module: DDP(mixed_precision=...) keeps copies of the parameters that the optimizer "
            "does not see; use torch.autocast"
        )
    if getattr(module, "_comm_hooks", None):
        raise ValueError(
            "module: DDP's communication hook would see no gradient, since clipped sums are "
            "all-reduced by the engine; do not register one"
        )
    if any(isinstance(p, DTensor) for p in module.parameters()):
        raise ValueError("module: DDP over sharded parameters; use fully_shard alone")


def inner_model(module: nn.Module) -> nn.Module:
    """The model inside a DDP wrapper; `module` itself where there is no DDP wrapper."""
    return module.module if isinstance(module, _WRAPPERS) else module  # type: ignore[return-value]
