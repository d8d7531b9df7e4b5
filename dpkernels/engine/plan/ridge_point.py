"""A device's ridge point: the operations it does in the time of moving one byte.

The ridge point depends on the kind of product: a GPU's matrix units do sixteen times as many
operations on bfloat16 as its other units on float32. The ridge point is measured once per device,
kind of product, version of PyTorch and number of threads, and kept in the user's cache directory
(``XDG_CACHE_HOME``, else ``~/.cache``), in ``dpkernels/ridge.json``. The environment variable
``DPKERNELS_RIDGE`` replaces the measurement: a number, or ``table`` for a value by kind of device
and product.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dpkernels.ops.precision import float32_products

#: ridge points by kind of device and product; those of GPUs: half of an H100's rates over bandwidth
_TABLE = {
    "cpu": {"float32": 10.0, "float64": 5.0},
    "cuda": {"bfloat16": 130.0, "float16": 130.0, "tf32": 65.0, "float32": 8.0, "float64": 8.0},
}
#: side of the square matrices, float32 values moved, repeats
_PROBES = {"cpu": (384, 1 << 24, 7), "cuda": (4096, 1 << 26, 15)}
#: share of a large product's rate that the products of layers reach
_LAYERS_REACH = 0.5
#: largest factor between a measurement and the table; beyond it, other work disturbed the measuring
_CREDIBLE = 4.0


def kind_of_products(device: torch.device, dtype: torch.dtype, convolution: bool = False) -> str:
    """The kind of product of operands of this dtype: a key of the table of ridge points.

    A CPU's kernels widen half precision first. On a GPU float32 is ``"tf32"`` where PyTorch's
    switches allow TF32 now, for convolutions or for matrix products.
    """
    if device.type != "cuda":
        return "float64" if dtype == torch.float64 else "float32"
    if dtype == torch.float32:
        precision = float32_products("cuda", "conv" if convolution else "matmul")
        return "float32" if precision == "ieee" else "tf32"
    return str(dtype).removeprefix("torch.")


def ridge_point(device: torch.device, kind: str = "float32") -> float:
    """Operations per byte of this device, for products of a kind (:func:`kind_of_products`).

    Raises:
        ValueError: ``DPKERNELS_RIDGE`` is neither ``table``, ``measure`` nor a number > 0.
    """
    stated = os.environ.get("DPKERNELS_RIDGE", "measure")
    if stated not in ("measure", "table"):
        try:
            value = float(stated)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf"):
            raise ValueError(
                f"DPKERNELS_RIDGE={stated!r}: expected 'measure', 'table' or a finite number > 0"
            )
        return value
    measurable = device.type in _PROBES and not _rounded(device, kind)
    if stated == "table" or not measurable:
        return _TABLE.get(device.type, _TABLE["cpu"])[kind]
    return _cached(device, kind, _key(device, kind))


def _rounded(device: torch.device, kind: str) -> bool:
    """Whether a product of float32 matrices, by which `kind` is measured, would be TF32 now."""
    on_gpu = device.type == "cuda" and kind == "float32"
    return on_gpu and float32_products("cuda", "matmul") != "ieee"


@functools.cache
def _cached(device: torch.device, kind: str, key: str) -> float:
    """The file's value, else a measurement, then written; the table's if no file can be written."""
    path = _path()
    known = _read(path)
    if key in known:
        return known[key]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.touch()
        value = measure(device, kind)
        scratch.write_text(json.dumps({**_read(path), key: value}, indent=1))
        scratch.replace(path)
    except OSError:
        return _TABLE[device.type][kind]
    return value


def _path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache) / "dpkernels" / "ridge.json"


def _read(path: Path) -> dict[str, float]:
    """Ridge points by key, from the file; empty where the file is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: float(v) for k, v in found.items() if isinstance(v, (int, float)) and v > 0}


def _key(device: torch.device, kind: str) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        name = f"{name} {os.cpu_count()} cores"
    probe = f"best of {_PROBES[device.type][2]}"
    threads = f"{torch.get_num_threads()} threads"
    return f"{name} | {kind} | torch {torch.__version__} | {threads} | {probe}"


def measure(device: torch.device, kind: str) -> float:
    """Rate of layers' products over the rate of a copy of float32 values, in operations per byte.

    The copy is into fresh memory, as stored gradients are. The best of several calls counts: other
    work on the machine only ever slows calls down. TF32 counts as half of bfloat16, the ratio of
    the matrix units' rates, so that none of PyTorch's switches has to be moved.
    """
    if kind == "tf32":
        return measure(device, "bfloat16") / 2
    side, values, repeats = _PROBES[device.type]
    dtype = getattr(torch, kind)
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(values, device=device)
    with torch.no_grad():
        compute = _seconds(lambda: torch.mm(left, right, out=product), device, repeats)
        move = _seconds(source.clone, device, repeats)
    ridge = _LAYERS_REACH * (2.0 * side**3 / compute) / (8.0 * values / move)
    stated = _TABLE[device.type][kind]
    return min(max(ridge, stated / _CREDIBLE), stated * _CREDIBLE)


def wait(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Shortest time of a call, in seconds; a first call does not count."""
    run()
    times = []
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - began)
    return max(min(times), 1e-9)
