"""Loads the native extensions and says why there is none.

The CPU extension is one library per instruction set (``dpkernels/_cpu.<set>.*.so``), of which the
widest that the machine can run is loaded; ``DPKERNELS_INSTRUCTION_SET`` chooses a narrower one.
Both extensions take plain data: ``tensor.data_ptr()``, an element type code, the key as bytes, the
launch and other structs as tuples.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch

INTERFACE = 4
"""Of the functions below, as the extensions state it (csrc/include/dpkernels/types.h)."""

_PACKAGE = Path(__file__).resolve().parent.parent
_SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_RUNNABLE = {
    "AVX512": ("avx512", "avx2", "baseline"),
    "AVX2": ("avx2", "baseline"),
}

Launch = tuple[int, int, int]


@functools.cache
def load(name: str) -> ModuleType | str:
    """The extension ``"cpu"`` or ``"cuda"``, or the reason why it cannot be loaded.

    Raises:
        RuntimeError: it was built from other sources than these, an in-place build left behind.
    """
    path = _cpu_library() if name == "cpu" else _PACKAGE / f"_cuda{_SUFFIX}"
    if isinstance(path, str):
        return path
    if not path.is_file():
        remedy = {
            "cpu": "reinstall with a C++ compiler and --no-cache-dir, without DPKERNELS_BUILD=off",
            "cuda": "reinstall with --no-cache-dir, and nvcc on PATH or under CUDA_HOME",
        }[name]
        return f"the {name} extension was not built ({remedy})"
    spec = importlib.util.spec_from_file_location(f"dpkernels._{name}", path)
    if spec is None or spec.loader is None:
        return f"{path.name} is not an extension of this Python"
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return f"{path.name} could not be loaded: {error}"
    if getattr(module, "interface", 1) != INTERFACE:
        raise RuntimeError(
            f"{path} was built from other sources than this package: build it again "
            "(python setup.py build_ext --inplace) or delete it"
        )
    return module


def extension(tensor: torch.Tensor) -> ModuleType:
    """The extension for the device of `tensor`.

    Raises:
        RuntimeError: it is not available, as :func:`why_not_cpu` or :func:`why_not_cuda` says.
    """
    module = load(tensor.device.type)
    if isinstance(module, str):
        raise RuntimeError(module)
    return module


def why_not_cpu() -> str | None:
    """Why the CPU extension cannot be used; None if it can."""
    module = load("cpu")
    return module if isinstance(module, str) else None


def why_not_cuda() -> str | None:
    """Why the CUDA extension cannot be used; None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device is available to PyTorch"
    module = load("cuda")
    return module if isinstance(module, str) else None


def dtype_code(dtype: torch.dtype) -> int:
    """The element type code that the kernels take (``DType`` in csrc/include/dpkernels/types.h)."""
    return _DTYPE_CODES[dtype]


def features_adjacent(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [B, T, F], or a copy where the features of a position do not lie side by side."""
    tensor = tensor.detach()
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def key_bytes(key: torch.Tensor) -> bytes:
    """The 32 bytes of a [4] int64 key on the CPU."""
    return key.numpy().tobytes()


def launch_on(tensor: torch.Tensor) -> Launch:
    """Threads, device and stream for a kernel that works on `tensor`."""
    if tensor.device.type == "cuda":
        stream = torch.cuda.current_stream(tensor.device)
        return (0, tensor.get_device(), stream.cuda_stream)
    return (torch.get_num_threads(), 0, 0)


def write_back(tensor: torch.Tensor, result: torch.Tensor) -> None:
    """Give `tensor` what a kernel has written into `result`, its contiguous twin or itself.

    Kernels write behind autograd's back: without a copy, the version counter is moved by hand.
    """
    if result.data_ptr() == tensor.data_ptr():
        torch.autograd.graph.increment_version(tensor)
        return
    with torch.no_grad():
        tensor.copy_(result)


def instruction_sets() -> list[str]:
    """The instruction sets that are built and that this machine runs, widest first."""
    return [name for name in _runnable() if _cpu_path(name).is_file()]


def _runnable() -> tuple[str, ...]:
    return _RUNNABLE.get(torch.backends.cpu.get_cpu_capability(), ("baseline",))


def _cpu_path(name: str) -> Path:
    return _PACKAGE / f"_cpu.{name}{_SUFFIX}"


def _cpu_library() -> Path | str:
    wanted = os.environ.get("DPKERNELS_INSTRUCTION_SET")
    if wanted is not None and wanted not in _runnable():
        return f"DPKERNELS_INSTRUCTION_SET={wanted!r}: this machine runs {', '.join(_runnable())}"
    built = instruction_sets()
    return _cpu_path(wanted or (built[0] if built else "baseline"))
