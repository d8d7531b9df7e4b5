"""Per-sample gradient ops of the CPU against the batch's weight gradient, one thread.

One row per case. Times are processor time of the thread (not of the wall), the lower quartile of
several interleaved calls. Columns:

* ``strategy``: what `conv_grad_sample` (or the op named by the case) runs;
* ``batch_ms``: the library's weight gradient, summed over the batch: what an ordinary step pays;
* ``ours_ms``, ``ours``: the op, and its share of ``batch_ms``;
* ``grouped``, ``looped``: the library's per-sample calls, as shares of ``batch_ms``;
* ``norm``: `conv_norm_sq` or `linear_norm_sq`, as a share of ``batch_ms``;
* ``backward``: (input gradient alone + the op) / (input and weight gradient together), the layer's
  price in a DP step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from bench import results, table, work
from dpkernels import ops
from dpkernels.ops.conv import cpu, library
from dpkernels.ops.conv.geometry import Geometry

SECONDS_PER_CASE = 0.8
PATH = results.RESULTS / "ops_cpu.csv"
KEY = ("device", "threads", "case")

CONVOLUTIONS = {
    # name: (B, Cin, Cout, input size, kernel, stride, axes)
    "3D U-Net 1->16": (2, 1, 16, 48, 3, 1, 3),
    "3D U-Net 16->16": (2, 16, 16, 48, 3, 1, 3),
    "3D U-Net 48->16": (2, 48, 16, 48, 3, 1, 3),
    "3D U-Net 16->2, one tap": (2, 16, 2, 48, 1, 1, 3),
    "3D U-Net 16->32": (2, 16, 32, 24, 3, 1, 3),
    "3D U-Net 32->32": (2, 32, 32, 24, 3, 1, 3),
    "3D U-Net 96->32": (2, 96, 32, 24, 3, 1, 3),
    "3D U-Net 32->64": (2, 32, 64, 12, 3, 1, 3),
    "3D U-Net 64->64": (2, 64, 64, 12, 3, 1, 3),
    "3D U-Net 192->64": (2, 192, 64, 12, 3, 1, 3),
    "3D U-Net 64->128": (2, 64, 128, 6, 3, 1, 3),
    "3D U-Net 128->128": (2, 128, 128, 6, 3, 1, 3),
    "3D U-Net 128->256": (2, 128, 256, 3, 3, 1, 3),
    "3D U-Net 256->256": (2, 256, 256, 3, 3, 1, 3),
    "3D U-Net 16->16, B=4": (4, 16, 16, 48, 3, 1, 3),
    "3D U-Net 64->64, B=4": (4, 64, 64, 12, 3, 1, 3),
    "MONAI UNet 1->16, stride 2": (2, 1, 16, 48, 3, 2, 3),
    "MONAI UNet 16->32, stride 2": (2, 16, 32, 24, 3, 2, 3),
    "MONAI UNet 32->64, stride 2": (2, 32, 64, 12, 3, 2, 3),
    "MONAI UNet 64->128, stride 2": (2, 64, 128, 6, 3, 2, 3),
    "MONAI UNet 2->32, transposed": (2, 2, 32, 48, 3, 2, 3),
    "MONAI UNet 2->2": (2, 2, 2, 48, 3, 1, 3),
    "ResNet 3->64": (64, 3, 64, 32, 3, 1, 2),
    "ResNet 64->64": (64, 64, 64, 32, 3, 1, 2),
    "ResNet 64->128, stride 2": (64, 64, 128, 32, 3, 2, 2),
    "ResNet 128->128": (64, 128, 128, 16, 3, 1, 2),
    "ResNet 256->256": (64, 256, 256, 8, 3, 1, 2),
    "ResNet 512->512": (64, 512, 512, 4, 3, 1, 2),
    "depthwise 64, 3D": (2, 64, 64, 24, 3, 1, -3),
    "depthwise 96, 7 x 7": (16, 96, 96, 32, 7, 1, -2),
}

LINEAR = {
    # name: (B, T, I, O)
    "attention T=128": (8, 128, 256, 256),
    "attention T=256": (8, 256, 256, 256),
    "attention T=512": (8, 512, 256, 256),
    "feed-forward T=256": (8, 256, 256, 1024),
    "no sequence": (256, 1, 512, 512),
    "patches T=64": (16, 64, 768, 768),
}


def interleaved_ms(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Lower quartile of each function's processor time, in milliseconds, calls interleaved."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.monotonic() + SECONDS_PER_CASE
    while time.monotonic() < end or min(map(len, times.values())) < 5:
        for name, function in functions.items():
            start = time.thread_time()
            function()
            times[name].append(time.thread_time() - start)
    return {name: 1e3 * sorted(taken)[len(taken) // 4] for name, taken in times.items()}


def conv_row(
    batch: int, channels_in: int, channels_out: int, size: int, kernel: int, stride: int, axes: int
) -> dict[str, object]:
    """Measure one convolution; negative `axes` stands for a depthwise one."""
    groups, axes = (channels_in, -axes) if axes < 0 else (1, axes)
    padding = kernel // 2
    output = (size + 2 * padding - kernel) // stride + 1
    geometry = Geometry(
        (channels_out, channels_in // groups, *[kernel] * axes),
        (stride,) * axes,
        (padding,) * axes,
        (1,) * axes,
        groups,
    )
    input = torch.randn(batch, channels_in, *[size] * axes)
    grad_output = torch.randn(batch, channels_out, *[output] * axes)
    weight = torch.randn(geometry.weight_shape)
    arguments = (
        list(geometry.weight_shape),
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        groups,
    )

    def backward(*wanted: bool) -> object:
        return torch.ops.aten.convolution_backward(
            grad_output,
            input,
            weight,
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            False,
            [0] * axes,
            groups,
            list(wanted),
        )

    ms = interleaved_ms(
        {
            "batch": lambda: library.batch_grad(input, grad_output, geometry),
            "ours": lambda: ops.conv_grad_sample(input, grad_output, *arguments),
            "grouped": lambda: library.grouped_grad_sample(input, grad_output, geometry),
            "looped": lambda: library.looped_grad_sample(input, grad_output, geometry),
            "norm": lambda: ops.conv_norm_sq(input, grad_output, *arguments),
            "dgrad": lambda: backward(True, False, False),
            "both": lambda: backward(True, True, False),
        }
    )
    form = cpu.strategy(input, grad_output, geometry)
    return {
        "shape": f"B={batch} {channels_in}->{channels_out} {size}^{axes} k={kernel} s={stride}",
        "strategy": f"{form.__module__.rpartition('.')[2]}.{form.__name__}",
        "batch_ms": f"{ms['batch']:.3f}",
        "ours_ms": f"{ms['ours']:.3f}",
        **{name: f"{ms[name] / ms['batch']:.2f}" for name in ("ours", "grouped", "looped", "norm")},
        "backward": f"{(ms['dgrad'] + ms['ours']) / ms['both']:.2f}",
    }


def linear_row(batch: int, positions: int, inputs: int, outputs: int) -> dict[str, object]:
    """Measure one Linear layer."""
    activations = torch.randn(batch, positions, inputs)
    grad_output = torch.randn(batch, positions, outputs)
    flat = activations.flatten(0, 1), grad_output.flatten(0, 1)
    ms = interleaved_ms(
        {
            "batch": lambda: flat[1].T @ flat[0],
            "ours": lambda: ops.linear_grad_sample(activations, grad_output),
            "norm": lambda: ops.linear_norm_sq(activations, grad_output),
        }
    )
    return {
        "shape": f"B={batch} T={positions} {inputs}->{outputs}",
        "strategy": "linear_grad_sample",
        "batch_ms": f"{ms['batch']:.3f}",
        "ours_ms": f"{ms['ours']:.3f}",
        "ours": f"{ms['ours'] / ms['batch']:.2f}",
        "norm": f"{ms['norm'] / ms['batch']:.2f}",
    }


def run(budget: float | None, fresh: bool, path: Path = PATH) -> work.Outcome:
    """Measure on one thread; a row per case."""
    torch.set_num_threads(1)
    tables = ((CONVOLUTIONS, conv_row), (LINEAR, linear_row))
    todo = {
        name: partial(_write, name, measure, shape, path)
        for cases, measure in tables
        for name, shape in cases.items()
    }
    settings = {"cases": list(todo), "output": str(path)}
    return work.off(todo, "ops", settings, fresh=fresh, budget=budget)


def _write(
    name: str,
    measure: Callable[..., dict[str, object]],
    shape: tuple[int, ...],
    path: Path,
    report: work.Report,
) -> None:
    torch.manual_seed(0)
    here = asdict(results.Environment.here(torch.device("cpu"), "system"))
    table.replace(path, [{"case": name, **measure(*shape), **here}], KEY)
