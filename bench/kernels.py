"""Every backend of every op on one device, against what the device can do.

    python -m bench.kernels OUT.csv [--device cuda] [--budget SECONDS] [--item-seconds SECONDS]
    python -m bench.kernels OUT.csv --show

One row per op, shape, precision and backend that can run it: ``status`` is ``ok`` or why there are
no figures, ``ms`` is the median time,
``roofline_ms`` the least time that the call's bytes (each tensor once, in main memory) and
floating-point operations allow at the peaks measured in the same run, ``share`` the one over the
other. Precisions: ``bfloat16``; ``tf32`` and ``float32``, float32 tensors with TF32 allowed or not.
On the CPU the sizes shrink: that shows that all of it runs, nothing else.

The same command goes on with an interrupted run; a backend that has ended the process is left out,
with that as its status.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench import harness, results, table, timing, work
from dpkernels import ops
from dpkernels.ops.conv.geometry import Geometry
from dpkernels.ops.conv.gram import gradient_flops
from dpkernels.ops.noise import NoiseSource, blocks_needed
from dpkernels.ops.registry import Op

KEY = ("device", "op", "shape", "precision", "backend")
SECONDS = 0.25
CALLS = 5
SHRINK_ON_CPU = 8
PRECISIONS = {
    "bfloat16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "float32": (torch.float32, False),
}

LINEAR = [(8, 1024, 1024, 4096), (32, 128, 768, 768), (256, 1, 1024, 1024)]
"""Batch, positions, inputs, outputs."""
CONVOLUTIONS = [
    (2, 1, 16, 96, 3),
    (2, 16, 16, 96, 3),
    (2, 32, 32, 96, 3),
    (2, 64, 64, 48, 3),
    (32, 64, 64, 56, 2),
    (32, 256, 256, 14, 2),
]
"""Batch, channels in and out, side, axes; kernels of three, padded."""


@dataclass(frozen=True)
class Call:
    """An op with its arguments, and the work that it cannot avoid."""

    op: Op[Any]
    arguments: tuple[Any, ...]
    flops: float
    bytes: float


@dataclass(frozen=True)
class Place:
    """Where and in which precision tensors are made."""

    device: torch.device
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def shrink(self) -> int:
        """Divides lengths and image sides."""
        return 1 if self.device.type == "cuda" else SHRINK_ON_CPU

    def randn(self, *shape: int) -> torch.Tensor:
        """Standard normals of this precision."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)


Make = Callable[[Place], Call]
#: op, shape, precision
Item = tuple[str, str, str]


def cases() -> dict[tuple[str, str], Make]:
    """By op and shape, what makes the tensors of a call."""
    found: dict[tuple[str, str], Make] = {}
    for linear in (ops.linear_norm_sq, ops.linear_grad_sample, ops.linear_clipped_grad):
        for layer in LINEAR:
            name = "B={} T={} {}->{}".format(*layer)
            found[linear.name, name] = partial(_linear, linear, *layer)
    for conv in (ops.conv_norm_sq, ops.conv_grad_sample, ops.conv_clipped_grad):
        for shape in CONVOLUTIONS:
            name = "B={} {}->{} {}^{}".format(*shape)
            found[conv.name, name] = partial(_conv, conv, *shape)
    found["finish_grads_", "62 tensors, 11 M values, B=8"] = _finish
    found["gaussian_noise_", "64 M values"] = _noise
    found["normalization_grad_sample", "B=8 C=64 T=262,144"] = _normalization
    found["embedding_norm_sq", "B=64 T=512 D=768"] = _embedding
    return found


def _linear(op: Op[Any], batch: int, length: int, inputs: int, outputs: int, at: Place) -> Call:
    length, inputs, outputs = (max(1, n // at.shrink) for n in (length, inputs, outputs))
    a, g = at.randn(batch, length, inputs), at.randn(batch, length, outputs)
    gradient = 2.0 * batch * length * inputs * outputs
    gram = 1.0 * batch * length * (length + 1) * (inputs + outputs)
    read = float(a.element_size() * (a.numel() + g.numel()))
    if op is ops.linear_norm_sq:
        return Call(op, (a, g), min(gradient, gram), read)
    if op is ops.linear_grad_sample:
        return Call(op, (a, g), gradient, read + 4.0 * batch * inputs * outputs)
    factor = torch.rand(batch, device=at.device)
    return Call(op, (a, g, factor), gradient, read + 4.0 * inputs * outputs)


def _conv(
    op: Op[Any], batch: int, inputs: int, outputs: int, side: int, axes: int, at: Place
) -> Call:
    size = [max(2, side // at.shrink)] * axes
    a, g = at.randn(batch, inputs, *size), at.randn(batch, outputs, *size)
    weight, ones = [outputs, inputs, *[3] * axes], [1] * axes
    geometry = (weight, ones, ones, ones, 1)
    flops = batch * gradient_flops(g.shape, Geometry.of(*geometry))
    read = float(a.element_size() * (a.numel() + g.numel()))
    written = 4.0 * torch.Size(weight).numel()
    if op is ops.conv_norm_sq:
        return Call(op, (a, g, *geometry), flops, read)
    if op is ops.conv_grad_sample:
        return Call(op, (a, g, *geometry), flops, read + batch * written)
    factor = torch.rand(batch, device=at.device)
    return Call(op, (a, g, factor, *geometry), flops, read + written)


def _finish(at: Place) -> Call:
    widths = (64, 128, 256, 512)
    shapes = [(w, w, 3, 3) for w in widths for _ in range(4)] + [(w,) for w in widths] * 11
    outs = [torch.zeros(shape, device=at.device) for shape in (*shapes, (512,), (1000, 512))]
    samples = [at.randn(8, *out.shape) for out in outs]
    factor = torch.rand(8, device=at.device)
    key, blocks = NoiseSource().take_each([out.numel() for out in outs])
    values = sum(out.numel() for out in outs)
    arguments = (outs, samples, [factor] * len(outs), 1.0, 0.1, key, blocks, [False] * len(outs))
    size = values * (8.0 * samples[0].element_size() + 4.0)
    return Call(ops.finish_grads_, arguments, 16.0 * values, size)


def _noise(at: Place) -> Call:
    out = torch.zeros((1 << 26) // at.shrink**2, device=at.device, dtype=at.dtype)
    key, block = NoiseSource().take(8 * blocks_needed(out.numel()))
    size = 2.0 * out.numel() * out.element_size()
    return Call(ops.gaussian_noise_, (out, 1.0, key, block), 0.0, size)


def _normalization(at: Place) -> Call:
    x, g = (at.randn(8, 64, (1 << 18) // at.shrink**2) for _ in range(2))
    mean, rstd = (torch.ones(8, 8, device=at.device) for _ in range(2))
    size = 2.0 * x.numel() * x.element_size()
    return Call(ops.normalization_grad_sample, (x, g, mean, rstd), 4.0 * x.numel(), size)


def _embedding(at: Place) -> Call:
    ids = torch.randint(30_000, (64, 512 // at.shrink), device=at.device)
    g = at.randn(*ids.shape, 768)
    size = float(g.numel() * g.element_size() + 8 * ids.numel())
    return Call(ops.embedding_norm_sq, (ids, g, -1), 2.0 * g.numel(), size)


def median_seconds(call: Callable[[], object], clock: timing.Clock) -> float:
    """Median wall time of the calls that fit into SECONDS, at least CALLS, after one untimed."""
    call()
    times: list[float] = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or len(times) < CALLS:
        times.append(clock(call).wall)
    return statistics.median(times)


def peaks(at: Place, clock: timing.Clock) -> tuple[float, float]:
    """Bytes per second of a stream and flops per second of a matrix product, as measured here."""
    a, b, c = torch.ones(3, (1 << 26) // at.shrink**2, device=at.device)
    side = 8192 // at.shrink
    left, right = at.randn(side, side), at.randn(side, side)
    stream = median_seconds(lambda: torch.add(a, b, out=c), clock)
    product = median_seconds(lambda: left @ right, clock)
    return 12.0 * a.numel() / stream, 2.0 * side**3 / product


def show(path: Path) -> None:
    """Print, by op and precision, the share of the roofline that the best backends reach."""
    best: dict[tuple[str, str], dict[str, tuple[float, str]]] = {}
    for row in table.read(path):
        if row["status"] != "ok":
            what = " ".join(row[name] for name in ("op", "shape", "precision", "backend", "status"))
            work.console.print(what, highlight=False, markup=False)
            continue
        shapes = best.setdefault((row["op"], row["precision"]), {})
        found = (float(row["share"]), row["backend"])
        shapes[row["shape"]] = max(shapes.get(row["shape"], found), found)
    shown = Table("op", "precision", "shapes", "share of the roofline", "backends")
    for (op, precision), shapes in best.items():
        shares = sorted(share for share, _ in shapes.values())
        backends = ", ".join(sorted({backend for _, backend in shapes.values()}))
        share = f"{shares[0]:.0%} to {shares[-1]:.0%}"
        shown.add_row(op, precision, str(len(shapes)), share, backends)
    work.console.print(shown)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write; ends with 1 if something could not be measured (or as `work.off` says)."""
    options = _options(arguments)
    if options.show:
        show(options.output)
        return
    device = options.device
    clock = timing.CallClock(device) if device.type == "cuda" else timing.HostClock()
    best = cache(partial(peaks, clock=clock))
    here = asdict(results.Environment.here(device, "system"))

    def write(item: Item, backend: str, figures: Mapping[str, object]) -> None:
        op, shape, precision = item
        row = {"op": op, "shape": shape, "precision": precision, "backend": backend, **here}
        table.replace(options.output, [{**row, **figures}], KEY)

    def measure(item: Item, make: Make, report: work.Report) -> None:
        op, _, precision = item
        timing.allow_tf32(PRECISIONS[precision][1])
        at = Place(device, precision)
        torch.manual_seed(0)
        bandwidth, rate = best(at)
        call = make(at)
        least = max(call.bytes / bandwidth, call.flops / rate)
        bound = "memory" if call.bytes / bandwidth >= call.flops / rate else "arithmetic"
        for backend in call.op.candidates(*call.arguments):
            report(backend, 0.5)
            if status := _ended(report, item, backend):
                write(item, backend, {"status": status})
                continue
            report.begin(backend)
            try:
                with ops.use_backend(backend):
                    taken = median_seconds(lambda: call.op(*call.arguments), clock)
            except Exception as error:
                timing.require_working(device, f"{op}, {backend}: {error}")
                write(item, backend, {"status": harness.one_line(error)})
                continue
            figures = {
                "status": "ok",
                "ms": 1e3 * taken,
                "bound": bound,
                "roofline_ms": 1e3 * least,
                "share": least / taken,
                "tflops": 1e-12 * call.flops / taken,
                "gbytes_per_s": 1e-9 * call.bytes / taken,
                "peak_tflops": 1e-12 * rate,
                "peak_gbytes_per_s": 1e-9 * bandwidth,
            }
            write(item, backend, figures)

    items = {
        (op, shape, precision): make
        for precision in PRECISIONS
        for (op, shape), make in cases().items()
        if options.only in op
    }
    names = {" ".join(item): item for item in items}
    outcome = work.off(
        {name: partial(measure, item, items[item]) for name, item in names.items()},
        f"kernels-{device.type}",
        {"items": list(names), "output": str(options.output)},
        fresh=options.fresh,
        budget=options.budget,
        piece_seconds=options.item_seconds,
        lost=lambda name, status: write(names[name], "", {"status": status}),
    )
    raise SystemExit(0 if not (outcome.failed or outcome.ended) else 1)


def _ended(report: work.Report, item: Item, backend: str) -> str | None:
    """Why a backend is not tried: it has ended a process, with this op on this shape or another.

    A kernel that never ends would else take its limit on every shape, and the others' time.
    """
    if backend in report.ended:
        return report.ended[backend]
    for name, ended in report.elsewhere.items():
        if backend in ended and name.startswith(f"{item[0]} "):
            return f"not tried: it has ended the process on {name.removeprefix(item[0]).strip()}"
    return None


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the arguments, those of the command line by default, ask for; the device as torch's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=None, help="seconds")
    parser.add_argument(
        "--item-seconds",
        type=float,
        default=None,
        help=f"a backend that takes longer ends the process with {work.HUNG} "
        f"(default: {work.PIECE_SECONDS_ON_GPU:.0f} on a GPU)",
    )
    parser.add_argument("--fresh", action="store_true", help="do not go on with an earlier run")
    parser.add_argument("--show", action="store_true", help="only print a table of the CSV")
    parser.add_argument("--only", default="", help="ops whose name contains this text")
    options = parser.parse_args(arguments)
    if not options.show:
        try:
            options.device = results.usable(options.device)
        except ValueError as error:
            parser.error(str(error))
        options.item_seconds = work.piece_seconds(options.item_seconds, options.device)
    return options


if __name__ == "__main__":
    main()
