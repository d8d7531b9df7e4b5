"""Calls of single ops with the work that they cannot avoid: one place to add one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from bench import layers
from bench.layers import Conv, Linear
from dpkernels import ops
from dpkernels.ops.noise import NoiseSource
from dpkernels.ops.registry import Op

#: by name: dtype, and whether products of float32 may be TF32
PRECISIONS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
}
#: side -> channels in and out
_UNET = {
    48: ((1, 16), (16, 16), (24, 24), (48, 16)),
    24: ((16, 32), (32, 32), (96, 32)),
    12: ((32, 64), (64, 64), (96, 96), (192, 64)),
    6: ((64, 128), (128, 128)),
    3: ((128, 256), (256, 256)),
}
_RESNET = {32: ((3, 64), (64, 64)), 16: ((128, 128),), 8: ((256, 256),), 4: ((512, 512),)}
LAYERS: dict[str, tuple[Linear | Conv, ...]] = {
    "cpu": (
        Linear(8, 128, 256, 256),
        Linear(8, 256, 256, 256),
        Linear(8, 512, 256, 256),
        Linear(4, 1024, 256, 256),
        Linear(8, 256, 256, 1024),
        Linear(256, 1, 512, 512),
        Linear(16, 64, 768, 768),
        *(Conv(2, *channels, side) for side, pairs in _UNET.items() for channels in pairs),
        Conv(2, 16, 2, 48, kernel=1),
        Conv(4, 16, 16, 48),
        Conv(4, 64, 64, 12),
        # MONAI's UNet; 2 -> 32 as its transposed convolution has it
        Conv(2, 1, 16, 48, stride=2),
        Conv(2, 16, 32, 24, stride=2),
        Conv(2, 32, 64, 12, stride=2),
        Conv(2, 64, 128, 6, stride=2),
        Conv(2, 2, 32, 48, stride=2),
        Conv(2, 2, 2, 48),
        *(Conv(64, *c, side, axes=2) for side, pairs in _RESNET.items() for c in pairs),
        Conv(64, 64, 128, 32, stride=2, axes=2),
        # depthwise
        Conv(2, 64, 64, 24, groups=64),
        Conv(16, 96, 96, 32, kernel=7, axes=2, groups=96),
    ),
    "gpu": (
        Linear(8, 1024, 1024, 4096),
        Linear(32, 128, 768, 768),
        Linear(256, 1, 1024, 1024),
        Conv(2, 1, 16, 96),
        Conv(2, 16, 16, 96),
        Conv(2, 32, 32, 96),
        Conv(2, 64, 64, 48),
        Conv(32, 64, 64, 56, axes=2),
        Conv(32, 256, 256, 14, axes=2),
    ),
}
#: samples of the ops that end a step
_SAMPLES = 8


@dataclass(frozen=True)
class Place:
    """Where, in which precision and how large tensors are made."""

    device: torch.device
    precision: str = "float32"
    shrink: int = 1

    def randn(self, *shape: int) -> torch.Tensor:
        """Standard normals of this precision."""
        return torch.randn(shape, device=self.device, dtype=PRECISIONS[self.precision][0])

    def zeros(self, *shape: int) -> torch.Tensor:
        """Zeros in float32."""
        return torch.zeros(shape, device=self.device)

    def factors(self, batch: int) -> torch.Tensor:
        """Clip factors, [B]."""
        return torch.rand(batch, device=self.device)


@dataclass(frozen=True)
class Call:
    """An op with its arguments, and the work that it cannot avoid.

    Attributes:
        beside: the library's calls on the same layer, by name.
        form: how the CPU backend does it, where it has a choice.
    """

    op: Op[Any]
    arguments: tuple[Any, ...]
    flops: float
    bytes: float
    beside: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    form: str | None = None

    def __call__(self) -> object:
        return self.op(*self.arguments)


Make = Callable[[Place], Call]


def cases(suite: str) -> dict[tuple[str, str], Make]:
    """By op and shape, what makes the call; each suite, ``cpu`` and ``gpu``, has its own shapes."""
    linear = (ops.linear_norm_sq, ops.linear_grad_sample, ops.linear_clipped_grad)
    conv = (ops.conv_norm_sq, ops.conv_grad_sample, ops.conv_clipped_grad)
    found: dict[tuple[str, str], Make] = {}
    for layer in LAYERS[suite]:
        for op in linear if isinstance(layer, Linear) else conv:
            found[op.name, str(layer)] = partial(_of_layer, op, layer)
    if suite == "gpu":
        widths = (64, 128, 256, 512)
        resnet = [(w, w, 3, 3) for w in widths for _ in range(4)] + [(w,) for w in widths] * 11
        many = partial(_finish, [*resnet, (512,), (1000, 512)], 1.0)
        found["finish_grads_", "B=8, 62 tensors, 11 M values"] = many
        found["gaussian_noise_", "64 M values"] = partial(_noise, 1 << 26)
        found["normalization_grad_sample", "B=8 C=64 T=262,144"] = partial(
            _scales, ops.normalization_grad_sample, 8, 1 << 18
        )
        found["embedding_norm_sq", "B=64 T=512 D=768"] = partial(_embedding, 64, 512, 30_000, 768)
        return found
    for noise, std in (("no noise", 0.0), ("noise", 1.0)):
        found["finish_grad_", f"B=8, 1 M values, {noise}"] = partial(_finish_one, std)
    many = partial(_finish, [(1 << 16,)] * 16, 1.0)
    found["finish_grads_", "B=8, 16 tensors, 1 M values, noise"] = many
    found["weighted_sum_", "B=8, 1 M values"] = _weighted_sum
    found["gaussian_noise_", "8 M values"] = partial(_noise, 1 << 23)
    for op in (ops.normalization_grad_sample, ops.affine_grad_sample, ops.bias_grad_sample):
        found[op.name, "B=4 C=64 T=32,768"] = partial(_scales, op, 4, 1 << 15)
    found["embedding_norm_sq", "B=512 T=16 D=32"] = partial(_embedding, 512, 16, 16_000, 32)
    return found


def _of_layer(op: Op[Any], layer: Linear | Conv, at: Place) -> Call:
    layer = layer.smaller(at.shrink)
    pair, kind = layer.operands(at.randn), op.name.partition("_")[2]
    flops = 2.0 * layer.batch * layer.positions * layer.weights
    if kind == "norm_sq":  # or by two Grams, of which half
        sides = ((layer.input_positions, layer.inputs), (layer.positions, layer.outputs))
        flops = min(flops, 1.0 * layer.batch * sum(t * (t + 1) * width for t, width in sides))
    factor = (at.factors(layer.batch),) if kind == "clipped_grad" else ()
    per_sample = {"norm_sq": 1.0, "grad_sample": layer.weights, "clipped_grad": 0.0}[kind]
    written = layer.batch * per_sample + (layer.weights if factor else 0.0)
    call = Call(op, (*pair, *factor, *layer.geometry), flops, _bytes(*pair) + 4.0 * written)
    if at.device.type != "cpu" or kind != "grad_sample":
        return call
    form = None
    if isinstance(layer, Conv) and "cpu" in op.candidates(*call.arguments):
        form = layers.chosen_form(*pair, layer.geometry)
    return replace(call, beside=layer.library(pair), form=form)


def _finish(shapes: Sequence[tuple[int, ...]], noise_std: float, at: Place) -> Call:
    """The end of a step of a network with parameters of these shapes, eight samples."""
    outs = [at.zeros(*shape) for shape in shapes]
    samples = [at.randn(_SAMPLES, *shape) for shape in shapes]
    key, blocks = NoiseSource().take_each([out.numel() for out in outs])
    factors, keep = [at.factors(_SAMPLES)] * len(outs), [False] * len(outs)
    arguments = (outs, samples, factors, noise_std, 1.0 / _SAMPLES, key, blocks, keep)
    flops = 2.0 * sum(tensor.numel() for tensor in samples)
    return Call(ops.finish_grads_, arguments, flops, _bytes(*samples, *outs))


def _finish_one(noise_std: float, at: Place) -> Call:
    call = _finish([(1 << 20,)], noise_std, at)
    (out,), (samples,), (factor,), *noise, (block,), (keep,) = call.arguments
    return replace(call, op=ops.finish_grad_, arguments=(out, samples, factor, *noise, block, keep))


def _weighted_sum(at: Place) -> Call:
    call = _finish([(1 << 20,)], 0.0, at)
    (out,), (samples,), (factor,), *_ = call.arguments
    return Call(ops.weighted_sum_, (out, samples, factor), call.flops, _bytes(samples, out, out))


def _noise(values: int, at: Place) -> Call:
    out = at.randn(values // at.shrink**2)
    key, block = NoiseSource().take(out.numel())
    return Call(ops.gaussian_noise_, (out, 1.0, key, block), 0.0, _bytes(out, out))


def _scales(op: Op[Any], batch: int, length: int, at: Place) -> Call:
    """Gradients of scale and shift, or of the shift alone, of 64 channels."""
    x, g = (at.randn(batch, 64, length // at.shrink**2) for _ in range(2))
    if op is ops.bias_grad_sample:
        return Call(op, (g,), 1.0 * g.numel(), _bytes(g))
    if op is ops.affine_grad_sample:
        return Call(op, (x, g), 2.0 * x.numel(), _bytes(x, g))
    mean = at.zeros(batch, 8)
    return Call(op, (x, g, mean, mean + 1.0), 4.0 * x.numel(), _bytes(x, g))


def _embedding(batch: int, length: int, rows: int, width: int, at: Place) -> Call:
    ids = torch.randint(rows, (batch, max(1, length // at.shrink)), device=at.device)
    g = at.randn(*ids.shape, width)
    return Call(ops.embedding_norm_sq, (ids, g, -1), 2.0 * g.numel(), _bytes(ids, g))


def _bytes(*tensors: torch.Tensor) -> float:
    return float(sum(tensor.element_size() * tensor.numel() for tensor in tensors))
