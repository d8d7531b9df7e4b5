"""Each CPU op against what this core can do: bytes at memory speed, or flops at the matrix rate.

``share`` is the least time that the op's bytes and floating-point operations allow, over its time:
1 is the roofline. Bytes are counted once per tensor read or written, in main memory: an op whose
tensors fit into a cache can exceed 1. The peaks are measured in the same run, on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from bench import results, table, work
from dpkernels import ops
from dpkernels.ops.conv.geometry import Geometry
from dpkernels.ops.conv.gram import gradient_flops
from dpkernels.ops.noise import NoiseSource

PATH = results.RESULTS / "roofline.csv"
KEY = ("device", "threads", "op", "shape")
_SECONDS = 0.8
_CALLS = 5
_STREAM_ELEMENTS = 1 << 24
_MATRIX = 1536
_PARAMETERS = 16


@dataclass(frozen=True)
class Peaks:
    """What one core does at best: bytes per second of a stream, flops per second of a product."""

    bandwidth: float
    flops: float

    @classmethod
    def measured(cls, seconds: float = 2 * _SECONDS) -> Peaks:
        """By ``a + b -> c`` over 192 MiB and by a float32 matrix product."""
        a, b, c = torch.ones(3, _STREAM_ELEMENTS)
        left, right, product = torch.randn(3, _MATRIX, _MATRIX)
        stream = _least(lambda: torch.add(a, b, out=c), seconds)
        matrix = _least(lambda: torch.mm(left, right, out=product), seconds)
        return cls(12.0 * _STREAM_ELEMENTS / stream, 2.0 * _MATRIX**3 / matrix)

    def seconds(self, work: Work) -> float:
        """The least time for `work`."""
        return max(work.bytes / self.bandwidth, work.flops / self.flops)

    def bound(self, work: Work) -> str:
        """Which of the two it is."""
        by_memory = work.bytes / self.bandwidth >= work.flops / self.flops
        return "memory" if by_memory else "arithmetic"


@dataclass(frozen=True)
class Work:
    """A call with its tensors, and the work it cannot avoid."""

    call: Callable[[], torch.Tensor | list[torch.Tensor]]
    flops: float
    bytes: float


def run(budget: float | None, fresh: bool, path: Path = PATH) -> work.Outcome:
    """Measure on one thread; a row per op and shape."""
    torch.set_num_threads(1)
    peaks: list[Peaks] = []

    def measure(op: str, shape: str, make: Callable[[], Work], report: work.Report) -> None:
        if not peaks:
            peaks.append(Peaks.measured())
        torch.manual_seed(0)
        row = {"op": op, "shape": shape, **figures(make(), peaks[0])}
        here = asdict(results.Environment.here(torch.device("cpu"), "system"))
        table.replace(path, [{**row, **here}], KEY)

    todo = {f"{op} {shape}": partial(measure, op, shape, make) for op, shape, make in cases()}
    settings = {"items": list(todo), "output": str(path)}
    return work.off(todo, "roofline", settings, fresh=fresh, budget=budget)


def figures(task: Work, peaks: Peaks, seconds: float = _SECONDS) -> dict[str, object]:
    """The columns of one row."""
    taken = _least(task.call, seconds)
    return {
        "ms": 1e3 * taken,
        "bound": peaks.bound(task),
        "roofline_ms": 1e3 * peaks.seconds(task),
        "share": peaks.seconds(task) / taken,
        "gflops": 1e-9 * task.flops / taken,
        "gbytes_per_s": 1e-9 * task.bytes / taken,
        "peak_gflops": 1e-9 * peaks.flops,
        "peak_gbytes_per_s": 1e-9 * peaks.bandwidth,
    }


def cases() -> list[tuple[str, str, Callable[[], Work]]]:
    """Op, shape, and what makes the tensors."""
    found: list[tuple[str, str, Callable[[], Work]]] = []
    for name, make in _LINEAR.items():
        for shape in ((8, 256, 256, 1024), (4, 1024, 256, 256), (256, 1, 512, 512)):
            found.append((name, "B={} T={} {}->{}".format(*shape), partial(make, *shape)))
    for name, make in _CONV.items():
        for shape in ((2, 24, 24, 48, 3), (2, 96, 96, 12, 3), (64, 64, 64, 32, 2)):
            found.append((name, "B={} {}->{} {}^{}".format(*shape), partial(make, *shape)))
    for name, make in _STREAMS.items():
        found.append((name, "B=8, 1 M values each", partial(make, 8, 1 << 20)))
    found += [
        ("normalization_grad_sample", "B=4 C=64 T=32,768", partial(_normalization, 4, 64, 32_768)),
        ("affine_grad_sample", "B=4 C=64 T=32,768", partial(_affine, 4, 64, 32_768)),
        ("bias_grad_sample", "B=4 C=64 T=32,768", partial(_bias, 4, 64, 32_768)),
        ("embedding_norm_sq", "B=512 T=16 D=32", partial(_embedding, 512, 16, 32)),
    ]
    return found


def _linear(
    op: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    written: Callable[[int, int, int], int],
    norms_only: bool,
    batch: int,
    length: int,
    inputs: int,
    outputs: int,
) -> Work:
    a, g = torch.randn(batch, length, inputs), torch.randn(batch, length, outputs)
    flops = 2.0 * batch * length * inputs * outputs
    if norms_only:
        gram = 1.0 * batch * length * (length + 1) * (inputs + outputs)
        flops = min(flops, gram)
    size = a.numel() + g.numel() + written(batch, inputs, outputs)
    return Work(lambda: op(a, g), flops, 4.0 * size)


def _clipped_linear(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return ops.linear_clipped_grad(a, g, torch.full((len(a),), 0.5))


_LINEAR = {
    "linear_norm_sq": partial(_linear, ops.linear_norm_sq, lambda b, i, o: b, True),
    "linear_grad_sample": partial(
        _linear, ops.linear_grad_sample, lambda b, i, o: b * i * o, False
    ),
    "linear_clipped_grad": partial(_linear, _clipped_linear, lambda b, i, o: i * o, False),
}


def _conv(
    op: Callable[..., torch.Tensor],
    per_sample: bool,
    batch: int,
    inputs: int,
    outputs: int,
    side: int,
    axes: int,
) -> Work:
    a, g = (torch.randn(batch, channels, *[side] * axes) for channels in (inputs, outputs))
    weight = [outputs, inputs, *[3] * axes]
    geometry = (weight, [1] * axes, [1] * axes, [1] * axes, 1)
    flops = batch * gradient_flops(g.shape, Geometry.of(*geometry))
    written = torch.Size(weight).numel() * (batch if per_sample else 1)
    return Work(lambda: op(a, g, *geometry), flops, 4.0 * (a.numel() + g.numel() + written))


def _clipped_conv(a: torch.Tensor, g: torch.Tensor, *geometry: object) -> torch.Tensor:
    return ops.conv_clipped_grad(a, g, torch.full((len(a),), 0.5), *geometry)


_CONV = {
    "conv_grad_sample": partial(_conv, ops.conv_grad_sample, True),
    "conv_clipped_grad": partial(_conv, _clipped_conv, False),
}


def _weighted_sum(batch: int, size: int) -> Work:
    out, samples, factor = torch.zeros(size), torch.randn(batch, size), torch.full((batch,), 0.5)
    values = samples.numel() + 2 * out.numel()
    call = partial(ops.weighted_sum_, out, samples, factor)
    return Work(call, 2.0 * samples.numel(), 4.0 * values)


def _finish(noise_std: float, batch: int, size: int) -> Work:
    out, samples, factor = torch.zeros(size), torch.randn(batch, size), torch.full((batch,), 0.5)
    key, block = NoiseSource().take(size)
    call = partial(
        ops.finish_grad_, out, samples, factor, noise_std, 1.0 / batch, key, block, False
    )
    return Work(call, 2.0 * samples.numel(), 4.0 * (samples.numel() + out.numel()))


def _finish_many(noise_std: float, batch: int, size: int) -> Work:
    """The end of a step of a network of sixteen parameters."""
    outs = list(torch.zeros(_PARAMETERS, size // _PARAMETERS).unbind(0))
    samples = [torch.randn(batch, len(out)) for out in outs]
    factors = [torch.full((batch,), 0.5)] * _PARAMETERS
    source = NoiseSource()
    taken = [source.take(len(out)) for out in outs]
    arguments = (noise_std, 1.0 / batch, taken[0][0], [block for _, block in taken])
    accumulate = [False] * _PARAMETERS
    call = partial(ops.finish_grads_, outs, samples, factors, *arguments, accumulate)
    return Work(call, 2.0 * batch * size, 4.0 * (batch + 1) * size)


def _noise(batch: int, size: int) -> Work:
    out = torch.zeros(batch * size)
    key, block = NoiseSource().take(out.numel())
    call = partial(ops.gaussian_noise_, out, 1.0, key, block)
    return Work(call, 0.0, 8.0 * out.numel())


_STREAMS = {
    "weighted_sum_": _weighted_sum,
    "finish_grad_, no noise": partial(_finish, 0.0),
    "finish_grad_, noise": partial(_finish, 1.0),
    "finish_grads_, noise": partial(_finish_many, 1.0),
    "gaussian_noise_": _noise,
}


def _normalization(batch: int, channels: int, length: int) -> Work:
    x, g = torch.randn(2, batch, channels, length)
    mean, rstd = torch.zeros(batch, 8), torch.ones(batch, 8)
    call = partial(ops.normalization_grad_sample, x, g, mean, rstd)
    return Work(call, 4.0 * x.numel(), 8.0 * x.numel())


def _affine(batch: int, channels: int, length: int) -> Work:
    x, g = torch.randn(2, batch, channels, length)
    return Work(partial(ops.affine_grad_sample, x, g), 2.0 * x.numel(), 8.0 * x.numel())


def _bias(batch: int, channels: int, length: int) -> Work:
    g = torch.randn(batch, channels, length)
    return Work(partial(ops.bias_grad_sample, g), 1.0 * g.numel(), 4.0 * g.numel())


def _embedding(batch: int, length: int, width: int) -> Work:
    ids, g = torch.randint(16_000, (batch, length)), torch.randn(batch, length, width)
    call = partial(ops.embedding_norm_sq, ids, g, -1)
    return Work(call, 2.0 * g.numel(), 4.0 * g.numel() + 8.0 * ids.numel())


def _least(call: Callable[[], object], seconds: float) -> float:
    """Processor time of the fastest of the calls that fit into `seconds`."""
    call()
    times: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times) < _CALLS:
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)
