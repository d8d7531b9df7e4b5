"""A step of a GPU case without a GPU: which kernels it launches, and how the planner decides.

    TRITON_INTERPRET=0 python -m bench.meta [CASE...] [--json]

The step runs on tensors without storage that count as a GPU's: nothing is computed, every launch
of a Triton kernel and every call of the CUDA extension is written down, and PyTorch's own
operations that would launch a kernel are counted (views and metadata do not). Autocast, which such
tensors do not have, is stood in for by casting what the list of autocast operations casts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dpkernels
from bench import cases, rivals, work
from dpkernels import ops
from dpkernels.engine.plan import planner, ridge_point
from dpkernels.engine.release.pending import PendingGradients
from dpkernels.layers import norm
from dpkernels.ops import native, registry, triton_support

_META = torch.device("meta")
_GPU = torch.device("cuda")
#: what has a name in an object, and what takes its place
_Change = tuple[Any, str, Any]
#: free memory of an H100 with 80 GB, whose share is the planner's budget
_FREE = 78 << 30
_VIEWS_AND_METADATA = (
    "view _unsafe_view t transpose permute expand unsqueeze squeeze slice select detach alias "
    "as_strided reshape split split_with_sizes unbind narrow unflatten empty empty_like new_empty "
    "empty_strided new_empty_strided unfold _reshape_alias lift_fresh diagonal movedim flatten "
    "promote_types"
)
#: operations that launch nothing
_NO_KERNEL = frozenset(_VIEWS_AND_METADATA.split())


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel, with the arguments it was called with."""

    kernel: Any
    grid: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass
class Step:
    """What one step asks of the device.

    Attributes:
        launches: of Triton kernels, in order.
        calls: of the CUDA extension, by name.
        operations: PyTorch's own that launch a kernel, by name.
        plan: rows of ``PrivacyEngine.explain()``; none of an ordinary step.
    """

    launches: list[Launch] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    plan: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Counts, and the plan by strategy and backend, as JSON takes them."""
        strategies = Counter(f"{row['strategy']}, {row['backend']}" for row in self.plan)
        return {
            "operations": sum(self.operations.values()),
            "triton": dict(sorted(Counter(x.kernel.__name__ for x in self.launches).items())),
            "cuda": dict(sorted(self.calls.items())),
            "plan": dict(sorted(strategies.items())),
            "kept_bytes": sum(row["kept_bytes"] for row in self.plan),
        }


class _Kernel:
    """Stands in for a Triton kernel; writes its launches down."""

    def __init__(self, kernel: Any, launches: list[Launch]):
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self._launches.append(
            Launch(self._kernel, grid, arguments, options)
        )


class _Extension:
    """Stands in for the CUDA extension; counts its calls."""

    interface = native.INTERFACE

    def __init__(self, calls: Counter[str]):
        self._calls = calls

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: self._calls.update([name])


class _Counting(TorchDispatchMode):
    """Counts operations that launch a kernel."""

    def __init__(self, operations: Counter[str]):
        super().__init__()
        self._operations = operations

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.partition("::")[2]
        if name not in _NO_KERNEL:
            self._operations[name] += 1
        return function(*args, **(kwargs or {}))


class _Autocast(TorchFunctionMode):
    """What autocast to bfloat16 casts, for the operations that the cases use."""

    _HALF = (
        torch._C._nn.linear,
        nn.functional.linear,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
        torch.matmul,
        torch.bmm,
        torch._C._nn.scaled_dot_product_attention,
        nn.functional.scaled_dot_product_attention,
    )
    _SINGLE = (
        torch.layer_norm,
        torch.group_norm,
        nn.functional.layer_norm,
        nn.functional.group_norm,
        nn.functional.cross_entropy,
    )

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        dtype = torch.bfloat16 if function in self._HALF else None
        dtype = torch.float32 if function in self._SINGLE else dtype
        if dtype is None:
            return function(*args, **kwargs)

        def cast(value: Any) -> Any:
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        return function(*map(cast, args), **{name: cast(v) for name, v in kwargs.items()})


@contextlib.contextmanager
def as_gpu(step: Step) -> Iterator[None]:
    """Tensors without storage count as a GPU's, and what is launched on them goes to `step`.

    Raises:
        RuntimeError: Triton runs in its interpreter in this process.
    """
    if triton_support.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1: expected 0, as the interpreter launches nothing")
    extension = _Extension(step.calls)
    kind_of = registry._device_type

    def device_type(arguments: Iterable[Any]) -> str:
        found = kind_of(arguments)
        return "cuda" if found == "meta" else found

    def load(name: str) -> Any:
        return extension if name == "cuda" else "only a GPU is stood in for"

    changes: list[_Change] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (native, "load", load),
        (native, "extension", lambda _: extension),
        (native, "launch_on", lambda _: (0, 0, 0)),
        (native, "write_back", lambda tensor, _: tensor),
        (registry, "_device_type", device_type),
        (triton_support, "why_not_device", lambda _: None),
        *((owner, name, _Kernel(kernel, step.launches)) for owner, name, kernel in _kernels()),
    ]
    with _changed(changes):
        registry._module.cache_clear()
        yield
    registry._module.cache_clear()


@contextlib.contextmanager
def _changed(changes: Sequence[_Change]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(mock.patch.object(*change))
        yield


def _kernels() -> Iterator[tuple[ModuleType, str, Any]]:
    for found in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        if "triton" in found.name:
            module = importlib.import_module(found.name)
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                    yield module, name, value


def _engine_as_on_gpu(half: bool) -> contextlib.AbstractContextManager[None]:
    """The engine plans as on a GPU, and reads no value."""
    kind_of = ridge_point.kind_of_products
    changes: list[_Change] = [
        (planner, "kind_of_products", lambda _, *about: kind_of(_GPU, *about)),
        (planner, "ridge_point", lambda _, kind: ridge_point._TABLE["cuda"][kind]),
        (planner, "default_memory_budget", lambda _: int(_FREE * planner._BUDGET_SHARE)),
        (PendingGradients, "refuse_not_finite", lambda *_: None),
        (norm, "_autocast", lambda _: half),
    ]
    return _changed(changes)


def private_step(case: cases.Case) -> Step:
    """The second step of a case with the engine, as the first one plans."""
    engine, step = dpkernels.PrivacyEngine(), Step()
    with _workload(case) as workload:
        train = rivals.ours(workload, rivals.Privacy(1.0, 1.0), engine, trial="off")
        with as_gpu(step), _engine_as_on_gpu(case.precision == "bfloat16"):
            train()
            for counted in (step.launches, step.calls, step.operations):
                counted.clear()
            with _Counting(step.operations):
                train()
    step.plan = engine.explain().rows
    return step


def ordinary_step(case: cases.Case) -> Step:
    """The same step without privacy."""
    step, (ordinary, *_) = Step(), rivals.RIVALS
    with _workload(case) as workload:
        train = ordinary.prepare(workload, rivals.Privacy(1.0, 1.0))
        with _Counting(step.operations):
            train()
    return step


@contextlib.contextmanager
def _workload(case: cases.Case) -> Iterator[cases.Workload]:
    """The case on tensors without storage, with its autocast stood in for."""
    with _META:
        workload = case.build(_META)
    half = case.precision == "bfloat16"
    autocast = mock.Mock(side_effect=_Autocast if half else contextlib.nullcontext)
    with mock.patch.object(cases.Workload, "autocast", autocast):
        yield workload


def main(arguments: Sequence[str] | None = None) -> None:
    """Print, case by case, what a step launches and how the planner decides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="*", help="default: every GPU case")
    parser.add_argument("--json", action="store_true", help="one object, by case")
    options = parser.parse_args(arguments)
    found = {}
    for case in cases.find(options.case, "gpu"):
        ordinary = ordinary_step(case).summary()["operations"]
        found[case.name] = {"ordinary": ordinary, **private_step(case).summary()}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    heads = ("case", "ordinary", "ours", "Triton", "CUDA", "kept, GB", "plan")
    lines = []
    for name, row in found.items():
        plan = ", ".join(f"{count} {how}" for how, count in row["plan"].items())
        launches = (sum(row["triton"].values()), sum(row["cuda"].values()))
        kept = f"{row['kept_bytes'] / 1e9:.2f}"
        lines.append((name, row["ordinary"], row["operations"], *launches, kept, plan))
    work.say_table(heads, lines, "operations of a step that launch kernels")


if __name__ == "__main__":
    main()
