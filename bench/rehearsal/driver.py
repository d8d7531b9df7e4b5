"""Triton's whole way to a launch on a machine without a GPU, for compute capability 9.0.

:func:`install` gives Triton a driver whose launches lead nowhere: kernels are specialised, compiled
and kept in Triton's cache, the C launcher is built and called, into a libcuda that does nothing.
What a kernel would have written stays as it was. :class:`Redirect` puts tensors elsewhere that a
program asks for on a GPU.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ARCHITECTURE = 90
_STUB = Path(__file__).with_name("stub_libcuda.c")
_libraries: list[Any] = []


class _Utils:
    """Answers in the place of Triton's helper module: an H100's limits, a handle for every kernel.

    Built and asked all the same: it is kept in the cache, and newer versions launch through it.
    """

    def __init__(self, helper: Any) -> None:
        self._helper = helper

    def __getattr__(self, name: str) -> Any:
        return getattr(self._helper, name)

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        return (1, 1, 0, 0, 1024)  # module, function, registers, spills, threads of a block

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232448,
            "max_num_regs": 65536,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }

    def unload_module(self, module: int) -> None:
        pass


def install() -> None:
    """Launch into nothing from now on: Triton's driver, and the answers of torch.cuda.

    Raises:
        RuntimeError: Triton was imported under TRITON_INTERPRET, or there is no C compiler.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_LIBCUDA_PATH"] = str(_load_stub())
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils = _Utils(nvidia.CudaUtils())
            self.launcher_cls = nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=0: divmod(ARCHITECTURE, 10)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", ARCHITECTURE, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())
    _answer_for_torch()
    _open_registry()


def _load_stub() -> Path:
    """Compile the stub and load it: it is then the process' libcuda.so.1; returns its folder."""
    folder = Path(tempfile.mkdtemp(prefix="stub-libcuda-"))
    library = folder / "libcuda.so.1"
    command = ["cc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, _STUB]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"{_STUB.name} could not be compiled: {error}") from error
    (folder / "libcuda.so").symlink_to(library.name)
    _libraries.append(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
    return folder


def _answer_for_torch() -> None:
    """torch.cuda as if there were one GPU, idle and empty."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 0  # PyTorch's own loops over devices do nothing
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: divmod(ARCHITECTURE, 10)
    torch.cuda.get_device_name = lambda device=None: "rehearsal"
    torch.cuda.mem_get_info = lambda device=None: (70 << 30, 80 << 30)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        setattr(torch.cuda, name, lambda device=None: 0)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda *device: None)
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = lambda device: -1
    autocast = torch.autocast.__init__

    def on_cpu(self: Any, device_type: str, *arguments: Any, **options: Any) -> None:
        autocast(self, "cpu" if device_type == "cuda" else device_type, *arguments, **options)

    torch.autocast.__init__ = on_cpu


def _open_registry() -> None:
    """Every tensor counts as one on the GPU; there is no CUDA extension."""
    from dpkernels.ops import native, registry, triton_support

    load = native.load
    native.load = lambda name: "a rehearsal has no GPU" if name == "cuda" else load(name)
    registry._device_type = lambda arguments: "cuda"
    triton_support.why_not_device = lambda tensor: None


def empty_is_zero() -> None:
    """Let new memory hold zeros, which kernels that write nothing leave there."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, _filled(getattr(owner, name)))


def _filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def zeros(*arguments: Any, **options: Any) -> torch.Tensor:
        with torch.no_grad():
            return make(*arguments, **options).zero_()

    return zeros


class Redirect(TorchFunctionMode):
    """Makes on `device` what is asked for on a GPU."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = torch.device(device)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.cuda:
            function, args = torch.Tensor.to, (args[0], self._device)
        named = {name: self._placed(value) for name, value in (kwargs or {}).items()}
        return function(*map(self._placed, args), **named)

    def _placed(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return self._device if value.type == "cuda" else value
        if isinstance(value, str) and re.fullmatch(r"cuda(:\d+)?", value):
            return self._device
        return value
