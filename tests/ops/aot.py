"""Compiles, without a GPU, what the Triton launchers would launch, and reads off the resources.

The launchers run on tensors without storage while every kernel of the modules is replaced by a
recorder; each recorded launch is compiled for the wanted architectures with the specialisation
that Triton's just-in-time compiler would choose. Run as ``python -m tests.ops.aot`` in a process
without TRITON_INTERPRET: it writes the names of all kernels, then one row per kernel and
architecture, as lines of JSON. ``python -m tests.ops.aot KERNEL`` instead counts the matrix
instructions in the machine code of that kernel, case by case.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.ops import aot_cases

ARCHITECTURES = (80, 90)
MODULES = [importlib.import_module(name) for name in aot_cases.MODULES]
_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses, per thread (registers, stack) and per block (shared)."""

    case: str
    kernel: str
    architecture: int
    registers: int
    stack: int
    shared: int
    warps: int
    half_products: bool
    """Whether it multiplies matrices of 16-bit numbers."""
    matrix_unit: bool
    """Whether the PTX holds matrix instructions."""


class Recorder:
    """Stands in for a kernel; keeps the arguments of its launches."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]):
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record(modules: list[ModuleType], call: Callable[[], object]) -> list[Any]:
    """The launches that `call` makes through the kernels of `modules`."""
    launches: list[Any] = []
    kept = []
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                kept.append((module, name, value))
                setattr(module, name, Recorder(value, launches))
    try:
        call()
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
    return launches


def specialised(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> ASTSource:
    """The source that the just-in-time compiler would build for these arguments."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False))
    values |= {name: value for name, value in options.items() if name in names}
    free = {param.name for param in kernel.params if param.do_not_specialize}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for at, param in enumerate(kernel.params):
        value = values[param.name]
        is_one = type(value) is int and value == 1 and param.name not in free
        if param.is_constexpr or is_one:
            signature[param.name] = "constexpr"
            constants[param.name] = value
            continue
        signature[param.name] = _type_of(value)
        aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        if aligned and param.name not in free:
            attributes[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def binary_of(launch: Any, architecture: int) -> Any:
    """One recorded launch, compiled."""
    kernel, args, options = launch
    chosen = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    return triton.compile(
        specialised(kernel, args, options),
        target=GPUTarget("cuda", architecture, 32),
        options=chosen,
    )


def compiled(case: str, launch: Any, architecture: int) -> Resources:
    """Compile one recorded launch and read its resources from the binary."""
    kernel = launch[0]
    binary = binary_of(launch, architecture)
    usage = _resource_usage(binary.asm["cubin"])
    return Resources(
        case=case,
        kernel=kernel.__name__,
        architecture=architecture,
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=binary.metadata.shared,
        warps=binary.metadata.num_warps,
        half_products=re.search(r"tt\.dot .*xb?f16", binary.asm["ttir"]) is not None,
        matrix_unit=re.search(r"\b(wgmma|mma)\.", binary.asm["ptx"]) is not None,
    )


def _cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def _resource_usage(cubin: bytes) -> dict[str, int]:
    found = re.findall(r"\b([A-Z]+):(\d+)", _cuobjdump("-res-usage", cubin))
    return {name: int(n) for name, n in found}


def matrix_instructions(name: str) -> Iterator[str]:
    """A line for each case and architecture in which the kernel `name` is launched."""
    for case, call in aot_cases.CASES.items():
        for launch in (one for one in record(MODULES, call) if one[0].__name__ == name):
            for architecture in ARCHITECTURES:
                sass = _cuobjdump("-sass", binary_of(launch, architecture).asm["cubin"])
                counts = Counter(re.findall(r"\b(?:HMMA|HGMMA)[.\w]*", sass))
                found = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
                yield f"{case}, sm_{architecture}: {found or 'none'}"


def kernel_names() -> list[str]:
    """Every kernel that can be launched (other jitted functions are parts of kernels)."""
    jitted = (v for module in MODULES for v in vars(module).values())
    names = {v.__name__ for v in jitted if isinstance(v, triton.JITFunction)}
    return sorted(name for name in names if name.endswith("_kernel"))


def rows() -> Iterator[Resources]:
    """All cases on all architectures; a launch that several cases share is compiled once."""
    seen = set()
    for cases, architectures in ((aot_cases.CASES, ARCHITECTURES), (aot_cases.SIZES_OF_ONE, (90,))):
        for case, call in cases.items():
            for launch in record(MODULES, call):
                kernel, args, options = launch
                key = (kernel.__name__, specialised(kernel, args, options).hash(), str(options))
                if key in seen:
                    continue
                seen.add(key)
                for architecture in architectures:
                    yield compiled(case, launch, architecture)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for line in matrix_instructions(sys.argv[1]):
            sys.stdout.write(line + "\n")
        raise SystemExit
    sys.stdout.write(json.dumps(kernel_names()) + "\n")
    for row in rows():
        sys.stdout.write(json.dumps(asdict(row)) + "\n")
