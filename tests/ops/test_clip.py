"""Clip factors (sound rounding) and the fused end of a DP step, against float64 truth."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkernels.ops import native
from dpkernels.ops.clip import clip_factor, finish_grad_, finish_grads_, weighted_sum_
from dpkernels.ops.noise import blocks_needed, gaussian_noise_
from dpkernels.ops.registry import use_backend
from tests.ops import shapes

BACKENDS = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
COMPILED = BACKENDS[1:]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Clip factors.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_clip_factor_values(backend: str, dtype: torch.dtype, gamma: float) -> None:
    norms = [0.0, 1e-20, 0.3, 1.0, 1.5, 1.5000001, 2.0, 777.0, 1e18]
    norm_sq = torch.tensor([norm * norm for norm in norms], dtype=dtype)
    with use_backend(backend):
        factor = clip_factor(norm_sq.to(device_of(backend)), 1.5, gamma).cpu()
    assert factor.dtype == dtype
    roots = norm_sq.double().sqrt()
    expected = 1.5 / (roots + gamma) if gamma else (1.5 / roots).clamp(max=1.0)
    assert torch.allclose(factor.double(), expected, rtol=3 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_factor_of_what_is_no_norm(backend: str, dtype: torch.dtype) -> None:
    """A norm that is not finite silences the sample; a square below 0 is a rounded 0."""
    norm_sq = torch.tensor([math.nan, math.inf, -math.inf, -1e-9, -0.0], dtype=dtype)
    with use_backend(backend):
        factor = clip_factor(norm_sq.to(device_of(backend)), 1.0).cpu()
    assert factor.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_factor_of_no_samples(backend: str) -> None:
    with use_backend(backend):
        assert clip_factor(torch.empty(0, device=device_of(backend)), 1.0).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_clipping_is_sound(backend: str, dtype: type, data: st.DataObject) -> None:
    """factor * norm <= C, exactly and as rounded, for any norm and any C."""
    width = 32 if dtype is np.float32 else 64
    tiny, huge = (2.0**-100, 2.0**120) if width == 32 else (1e-200, 1e200)
    norm_sq = data.draw(st.floats(tiny, huge, width=width).map(dtype))
    bound = data.draw(st.floats(1e-6, 1e6))
    with use_backend(backend):
        tensor = torch.from_numpy(np.array([norm_sq], dtype=dtype))
        factor = clip_factor(tensor, bound).numpy()[0]
    norm = np.sqrt(norm_sq)
    assert factor.dtype == norm.dtype == dtype
    assert float(factor * norm) <= bound
    assert Fraction(float(factor)) * Fraction(float(norm)) <= Fraction(bound)
    rounded_root = 1 + Fraction(1, 2**51)  # of a square whose root rounds down to C itself
    squared = Fraction(float(factor)) ** 2 * Fraction(float(norm_sq))
    assert squared <= Fraction(bound) ** 2 * rounded_root
    assert float(factor) >= min(1.0, bound / float(norm)) * (1 - 5 * np.finfo(dtype).eps)


# The clipped sum and the end of a step.


def operands(batch: int, shape: tuple[int, ...], out_dtype, sample_dtype, backend: str):
    device = device_of(backend)
    draw = generator(batch + len(shape))
    out = torch.randn(shape, generator=draw).to(out_dtype).to(device)
    grad_sample = torch.randn((batch, *shape), generator=draw).to(sample_dtype).to(device)
    factor = torch.rand(batch, generator=draw)
    factor = factor.to(torch.float64 if out_dtype == torch.float64 else torch.float32).to(device)
    return out, grad_sample, factor


def truth_of(out, grad_sample, factor, noise_std, scale, key, block, accumulate) -> torch.Tensor:
    """The definition, in float64 on the CPU, with the reference's noise."""
    total = torch.zeros(out.shape, dtype=torch.float64)
    for weight, sample in zip(factor.cpu().double(), grad_sample.cpu().double(), strict=True):
        if weight != 0:
            total += weight * sample
    if accumulate:
        total += out.cpu().double()
    if noise_std:
        z = torch.zeros(out.shape, dtype=torch.float64)
        with use_backend("reference"):
            total += noise_std * gaussian_noise_(z, 1.0, key, block)
    return scale * total


def assert_close(result: torch.Tensor, truth: torch.Tensor, magnitude: float) -> None:
    """Within a few units of rounding of the accumulator plus one of the result's own dtype."""
    accumulator = 1e-15 if result.dtype == torch.float64 else 2e-6
    error = (result.cpu().double() - truth).abs()
    bound = accumulator * magnitude + torch.finfo(result.dtype).eps * truth.abs()
    if result.dtype == torch.float16:
        bound = bound + 2.0**-24
    assert (error <= bound).all(), (error - bound).max()


SHAPES = [(0,), (1,), (9,), (2047,), (2049,), (4, 3, 5, 7, 11), ()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("noise_std", [0.0, 0.8])
def test_finish_grad(
    backend: str,
    shape: tuple[int, ...],
    batch: int,
    accumulate: bool,
    noise_std: float,
    key: torch.Tensor,
) -> None:
    for dtype in (torch.float32, torch.float64):
        out, grad_sample, factor = operands(batch, shape, dtype, dtype, backend)
        arguments = (grad_sample, factor, noise_std, 0.125, key, 77, accumulate)
        truth = truth_of(out, *arguments)
        if not accumulate:
            out = torch.full_like(out, math.nan)
        with use_backend(backend):
            assert finish_grad_(out, *arguments) is out
        assert_close(out, truth, magnitude=batch + 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("sample_dtype", DTYPES)
def test_every_pair_of_dtypes(
    backend: str, out_dtype: torch.dtype, sample_dtype: torch.dtype, key: torch.Tensor
) -> None:
    out, grad_sample, factor = operands(4, (301,), out_dtype, sample_dtype, backend)
    arguments = (grad_sample, factor, 0.5, 2.0, key, 3, True)
    truth = truth_of(out, *arguments)
    with use_backend(backend):
        finish_grad_(out, *arguments)
    assert_close(out, truth, magnitude=15)
    out, grad_sample, factor = operands(4, (301,), out_dtype, sample_dtype, backend)
    truth = truth_of(out, grad_sample, factor, 0.0, 1.0, key, 0, True)
    with use_backend(backend):
        assert weighted_sum_(out, grad_sample, factor) is out
    assert_close(out, truth, magnitude=15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_silenced_sample_is_never_read(backend: str, poison: float, key: torch.Tensor) -> None:
    out, grad_sample, factor = operands(5, (100,), torch.float32, torch.float32, backend)
    factor[1] = factor[3] = 0.0
    clean = grad_sample.clone()
    grad_sample[1], grad_sample[3] = poison, -poison
    first, second = out.clone(), out.clone()
    with use_backend(backend):
        finish_grad_(first, grad_sample, factor, 0.3, 1.0, key, 0, True)
        finish_grad_(second, clean, factor, 0.3, 1.0, key, 0, True)
        weighted_sum_(out, grad_sample, factor)
    assert first.isfinite().all()
    assert torch.equal(first, second)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_is_pure_noise(backend: str, key: torch.Tensor) -> None:
    device = device_of(backend)
    out = torch.full((501,), math.nan, device=device)
    noise = torch.zeros(501, device=device)
    with use_backend(backend):
        finish_grad_(out, out.new_empty((0, 501)), out.new_empty(0), 1.5, 1.0, key, 9, False)
        gaussian_noise_(noise, 1.5, key, 9)
    assert torch.allclose(out, noise, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_operands(backend: str, key: torch.Tensor) -> None:
    """A channels_last gradient gets the same values as a contiguous one."""
    out, grad_sample, factor = operands(3, (6, 4, 5, 2), torch.float32, torch.float32, backend)
    channels_last = out.contiguous(memory_format=torch.channels_last)
    strided = grad_sample.transpose(1, 4).contiguous().transpose(1, 4)
    wide_factor = torch.stack((factor, factor), dim=1)[:, 0]
    with use_backend(backend):
        finish_grad_(out, grad_sample, factor, 0.3, 0.5, key, 4, True)
        finish_grad_(channels_last, strided, wide_factor, 0.3, 0.5, key, 4, True)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(channels_last, out, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_halves_make_the_whole(backend: str, key: torch.Tensor) -> None:
    """Physical batches add up to the logical one: sums first, noise and scale with the last."""
    out, grad_sample, factor = operands(6, (777,), torch.float64, torch.float64, backend)
    whole = torch.empty_like(out)
    with use_backend(backend):
        finish_grad_(whole, grad_sample, factor, 0.7, 0.1, key, 2, False)
        finish_grad_(out, grad_sample[:3], factor[:3], 0.0, 1.0, key, 0, False)
        finish_grad_(out, grad_sample[3:], factor[3:], 0.7, 0.1, key, 2, True)
    assert torch.allclose(out, whole, rtol=1e-13, atol=1e-14)


@pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
def test_threads_do_not_change_the_result(threads: None, key: torch.Tensor) -> None:
    out, grad_sample, factor = operands(4, (30_001,), torch.float32, torch.float32, "cpu")
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        with use_backend("cpu"):
            results.append(finish_grad_(out.clone(), grad_sample, factor, 1.0, 0.5, key, 0, True))
    assert all(torch.equal(result, results[0]) for result in results)


# All tensors in one call.

WIDE_NETWORK = [(shape, batch) for shape in SHAPES for batch in (0, 1, 5)] * 3
"""More tensors than one CUDA launch has room for, some of them empty."""


def many_operands(backend: str) -> tuple[list[torch.Tensor], ...]:
    """Tensors of every shape, dtype and number of samples; some channels-last, some shared."""
    parts = []
    for at, (shape, batch) in enumerate(WIDE_NETWORK):
        out, grad_sample, factor = operands(batch, shape, DTYPES[at % 4], DTYPES[at % 3], backend)
        if len(shape) == 5 and at % 2:
            out = out.contiguous(memory_format=torch.channels_last_3d)
        if batch and at % 5 == 0:
            factor[0] = 0.0
            grad_sample[0] = math.nan
        parts.append((out, grad_sample, factor))
    return tuple(list(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("noise_std", [0.0, 0.8])
def test_all_tensors_at_once_get_the_bits_of_each_alone(
    backend: str, noise_std: float, key: torch.Tensor
) -> None:
    outs, grad_samples, factors = many_operands(backend)
    blocks = [1000 * at for at in range(len(outs))]
    accumulate = [at % 3 != 0 for at in range(len(outs))]
    alone = [out.clone() for out in outs]
    with use_backend(backend):
        for each in zip(alone, grad_samples, factors, blocks, accumulate, strict=True):
            out, grad_sample, factor, block, add = each
            finish_grad_(out, grad_sample, factor, noise_std, 0.125, key, block, add)
        version = outs[1]._version
        result = finish_grads_(
            outs, grad_samples, factors, noise_std, 0.125, key, blocks, accumulate
        )
    assert all(one is other for one, other in zip(result, outs, strict=True))
    assert outs[1]._version > version
    assert all(torch.equal(out, one) for out, one in zip(outs, alone, strict=True))
    assert all(out.isfinite().all() for out in outs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tensors_at_all(backend: str, key: torch.Tensor) -> None:
    with use_backend("reference" if backend == "cuda" else backend):
        assert finish_grads_([], [], [], 1.0, 1.0, key, [], []) == []


@pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
def test_threads_do_not_change_many_results(threads: None, key: torch.Tensor) -> None:
    outs, grad_samples, factors = many_operands("cpu")
    blocks, accumulate = [0] * len(outs), [True] * len(outs)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        fresh = [out.clone() for out in outs]
        with use_backend("cpu"):
            finish_grads_(fresh, grad_samples, factors, 1.0, 0.5, key, blocks, accumulate)
        results.append(fresh)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grad_samples", [torch.zeros(4, 2, 3)]),
        ("grad_sample", [torch.zeros(4, 2, 3), torch.zeros(4, 3, 2)]),
        ("clip_factors", []),
        ("clip_factor", [torch.ones(4), torch.ones(3)]),
        ("blocks", [0]),
        ("block", [0, -1]),
        ("accumulate", [True]),
        ("noise_std", -1.0),
        ("scale", math.inf),
        ("outs", [torch.zeros(2, 3), torch.zeros(2, 3, device="meta")]),
    ],
)
def test_bad_arguments_of_all_at_once(name: str, value: object, key: torch.Tensor) -> None:
    arguments: dict[str, object] = {
        "outs": [torch.zeros(2, 3), torch.zeros(2, 3)],
        "grad_samples": [torch.zeros(4, 2, 3), torch.zeros(4, 2, 3)],
        "clip_factors": [torch.ones(4), torch.ones(4)],
        "noise_std": 1.0,
        "scale": 1.0,
        "key": key,
        "blocks": [0, 1],
        "accumulate": [True, False],
    }
    plural = next(argument for argument in (name, f"{name}s") if argument in arguments)
    with pytest.raises(ValueError, match=f"^{name}"):
        finish_grads_(**{**arguments, plural: value})


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_round_trip(backend: str, dtype: torch.dtype) -> None:
    """All 65536 patterns survive load and store; NaN stays NaN."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = patterns.clone().to(device_of(backend))
    with use_backend(backend):
        weighted_sum_(out, out.new_empty((0, *out.shape)), out.new_empty(0, dtype=torch.float32))
    assert torch.equal(out.cpu().isnan(), patterns.isnan())
    kept = ~patterns.isnan()
    assert torch.equal(out.cpu()[kept], patterns[kept])


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounding(backend: str, dtype: torch.dtype, key: torch.Tensor) -> None:
    """Stores round to nearest even like torch: random bits, halfway points, subnormals."""
    device = device_of(backend)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator(3)).to(torch.int32)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    steps = torch.nextafter(halves, torch.tensor(math.inf))
    middles = (halves[:-1].double() + halves[1:].double()).div(2).float()
    scaled = torch.randn(100_000, generator=generator(4)) * 2.0**-20
    values = torch.cat((bits.view(torch.float32), halves, steps, middles, scaled)).to(device)
    out = torch.empty(len(values), dtype=dtype, device=device)
    with use_backend(backend):
        one = torch.ones(1, device=device)
        finish_grad_(out, values[None], one, 0.0, 1.0, key, 0, False)
    expected = values.to(dtype)
    same = (out == expected) | (out.isnan() & expected.isnan())
    assert same.all(), values[~same][:5]


# Bad input and registration.


def good() -> dict[str, object]:
    return {
        "out": torch.zeros(2, 3),
        "grad_sample": torch.zeros(4, 2, 3),
        "clip_factor": torch.ones(4),
        "noise_std": 1.0,
        "scale": 1.0,
        "key": torch.zeros(4, dtype=torch.int64),
        "block": 0,
        "accumulate": False,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grad_sample", torch.zeros(4, 3, 2)),
        ("grad_sample", torch.tensor(0.0)),
        ("grad_sample", torch.zeros((4, 2, 3), dtype=torch.int64)),
        ("out", torch.zeros((2, 3), dtype=torch.int64)),
        ("clip_factor", torch.ones(3)),
        ("clip_factor", torch.ones(4, dtype=torch.bfloat16)),
        ("clip_factor", torch.ones(4, device="meta")),
        ("noise_std", -0.1),
        ("scale", math.nan),
        ("key", torch.zeros(4)),
        ("block", -1),
    ],
)
def test_bad_finish_arguments(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        finish_grad_(**{**good(), name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm_sq", torch.ones(2, 2)),
        ("norm_sq", torch.ones(2, dtype=torch.float16)),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", -1.0),
        ("max_grad_norm", math.nan),
        ("max_grad_norm", math.inf),
        ("gamma", -0.1),
    ],
)
def test_bad_clip_arguments(name: str, value: object) -> None:
    arguments = {"norm_sq": torch.ones(2), "max_grad_norm": 1.0, "gamma": 0.0, name: value}
    with pytest.raises(ValueError, match=name):
        clip_factor(**arguments)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded"])
@pytest.mark.parametrize("op", [clip_factor, weighted_sum_, finish_grad_, finish_grads_])
def test_torch_library_registration(op, layout: str, key: torch.Tensor) -> None:
    out, grad_sample, factor = operands(3, (10,), torch.float32, torch.float32, "cpu")
    grad_sample, factor = shapes.LAYOUTS[layout](grad_sample), shapes.LAYOUTS[layout](factor)
    if layout != "contiguous":
        out = shapes.LAYOUTS["sliced"](out)
    arguments = {
        "clip_factor": (factor, 1.0, 0.0),
        "weighted_sum_": (out, grad_sample, factor),
        "finish_grad_": (out, grad_sample, factor, 1.0, 0.5, key, 0, True),
        "finish_grads_": (
            [out, out.clone()],
            [grad_sample, grad_sample[:0]],
            [factor, factor[:0]],
            *(1.0, 0.5, key, [0, 2], [True, False]),
        ),
    }[op.name]
    torch.library.opcheck(op._library_op, arguments)


def test_blocks_needed() -> None:
    assert [blocks_needed(numel) for numel in (0, 1, 8, 9, 16, 17)] == [0, 1, 1, 2, 2, 3]
