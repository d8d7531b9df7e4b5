"""Gradients of scales and shifts: every backend against one sample at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dpkernels import ops
from dpkernels.ops.affine import cpu
from tests.ops import shapes
from tests.ops.compare import BACKENDS, DTYPES, assert_as_exact_as_torch, skip_unless_runs

Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def operands(
    name: str, dtype: torch.dtype, layout: str = "contiguous"
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, channels, positions, _ = shapes.REDUCTION[name]
    generator = torch.Generator().manual_seed(13)
    shape = (2, batch, channels, positions)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    value, grad_output = (shapes.LAYOUTS[layout](each) for each in drawn)
    return value, grad_output


def statistics(value: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """mean and rstd of [rows, groups, rest], as the layers hand them over."""
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    batch, channels, positions = value.shape
    if 0 in value.shape:
        return torch.zeros(batch, groups, dtype=dtype), torch.ones(batch, groups, dtype=dtype)
    rows = value.to(dtype).reshape(batch, groups, channels // groups * positions)
    return rows.mean(2), (rows.var(2, correction=0) + 1e-5).rsqrt()


def scaled_truth(value: torch.Tensor, grad: torch.Tensor) -> Grads:
    """sum over the last axis of value * grad: at the dtype, exactly, and of absolute values."""
    wide = value.double() * grad.double()
    return (value * grad).sum(2), wide.sum(2), wide.abs().sum(2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", shapes.REDUCTION)
def test_scale_and_shift(name: str, dtype: torch.dtype, backend: str) -> None:
    value, grad = operands(name, dtype)
    skip_unless_runs(ops.affine_grad_sample, backend, value, grad)
    scale = scaled_truth(value, grad)
    shift = scaled_truth(torch.ones_like(value), grad)
    last = value.transpose(1, 2).contiguous(), grad.transpose(1, 2).contiguous()
    factor = torch.linspace(0.2, 1.0, len(value))
    with ops.use_backend(backend):
        assert_as_exact_as_torch(ops.affine_grad_sample(value, grad), *scale)
        assert_as_exact_as_torch(ops.affine_last_grad_sample(*last), *scale)
        assert_as_exact_as_torch(ops.bias_grad_sample(grad), *shift)
        assert_as_exact_as_torch(ops.bias_last_grad_sample(last[1]), *shift)
        norms = tuple(each.square().sum(1) for each in scale)
        assert_as_exact_as_torch(ops.affine_norm_sq(value, grad), *norms)
        sums = tuple(factor.to(each.dtype) @ each for each in scale)
        assert_as_exact_as_torch(ops.affine_clipped_grad(value, grad, factor), *sums)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", shapes.REDUCTION)
def test_normalization(name: str, dtype: torch.dtype, backend: str) -> None:
    value, grad = operands(name, dtype)
    groups = shapes.REDUCTION[name][3]
    mean, rstd = statistics(value, groups)
    skip_unless_runs(ops.normalization_grad_sample, backend, value, grad, mean, rstd)
    per_channel = value.shape[1] // groups
    wide_mean, wide_rstd = (
        stat.double().repeat_interleave(per_channel, dim=1).unsqueeze(2) for stat in (mean, rstd)
    )
    normalized = (value.double() - wide_mean) * wide_rstd
    _, weight, size = scaled_truth(normalized, grad)
    _, bias, bias_size = scaled_truth(torch.ones_like(normalized), grad)
    plain = (normalized.to(dtype) * grad).sum(2)
    # The terms before the mean is taken off round too.
    size = size + ((value.double().abs() + wide_mean.abs()) * wide_rstd * grad.double().abs()).sum(
        2
    )
    with ops.use_backend(backend):
        actual = ops.normalization_grad_sample(value, grad, mean, rstd)
    assert_as_exact_as_torch(actual[0], plain, weight, size)
    assert_as_exact_as_torch(actual[1], grad.sum(2), bias, bias_size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", shapes.REDUCTION)
def test_normalization_over_the_last_axis(name: str, dtype: torch.dtype, backend: str) -> None:
    value, grad = (each.transpose(1, 2) for each in operands(name, dtype))
    width = value.shape[2]
    rows = value.reshape(-1, 1, width)
    mean, rstd = (stat.reshape(value.shape[:2]) for stat in statistics(rows, 1))
    skip_unless_runs(ops.normalization_last_grad_sample, backend, value, grad, mean, rstd)
    wide_mean, wide_rstd = (stat.double().unsqueeze(2) for stat in (mean, rstd))
    normalized = (value.double() - wide_mean) * wide_rstd
    exact = (normalized * grad.double()).sum(1)
    size = ((value.double().abs() + wide_mean.abs()) * wide_rstd * grad.double().abs()).sum(1)
    plain = (normalized.to(dtype) * grad).sum(1)
    with ops.use_backend(backend):
        actual = ops.normalization_last_grad_sample(value, grad, mean, rstd)
    assert_as_exact_as_torch(actual[0], plain, exact, 2 * size)
    bias = grad.double().sum(1), grad.double().abs().sum(1)
    assert_as_exact_as_torch(actual[1], grad.sum(1), *bias)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n, shape in shapes.REDUCTION.items() if shape[2]])
def test_statistics(name: str, dtype: torch.dtype, backend: str, offset: float) -> None:
    value = operands(name, torch.float64)[0].add(offset).to(dtype)
    batch, channels, positions, groups = shapes.REDUCTION[name]
    rows = value.reshape(batch, groups, channels // groups * positions)
    with ops.use_backend(backend):
        actual = ops.normalization_statistics(value, groups, 1e-5)
    # torch.var_mean itself loses three digits of a float64 mean here; a pairwise sum does not.
    mean = rows.double().mean(2)
    variance = (rows.double() - mean.unsqueeze(2)).square().mean(2)
    wide = rows.to(actual.dtype)
    plain_mean = wide.mean(2)
    plain_variance = (wide - plain_mean.unsqueeze(2)).square().mean(2)
    assert_as_exact_as_torch(actual[0], plain_mean, mean, wide.double().abs().mean(2))
    exact = (variance + 1e-5).rsqrt()
    # rstd inherits the relative error of variance + eps, of deviations that round at |x|.
    size = exact * (1 + offset**2 / 16 / (variance + 1e-5)).sqrt()
    assert_as_exact_as_torch(actual[1], (plain_variance + 1e-5).rsqrt(), exact, size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layers_gradients(backend: str) -> None:
    """Group, instance and layer norm, one sample at a time through autograd, in float64."""
    value, grad = operands("odd", torch.float64)
    for groups in (1, 3, 6):
        weight, bias = (torch.ones(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
        with ops.use_backend(backend):
            actual = ops.normalization_grad_sample(value, grad, *statistics(value, groups))
        for sample in range(len(value)):
            output = F.group_norm(value[sample : sample + 1], groups, weight, bias)
            exact = torch.autograd.grad(output, (weight, bias), grad[sample : sample + 1])
            torch.testing.assert_close(actual[:, sample], torch.stack(exact))
    weight, bias = (torch.ones(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, rstd = (s.reshape(value.shape[:2]) for s in statistics(value.reshape(-1, 1, 7), 1))
    with ops.use_backend(backend):
        actual = ops.normalization_last_grad_sample(value, grad, mean, rstd)
    for sample in range(len(value)):
        output = F.layer_norm(value[sample], (7,), weight, bias)
        exact = torch.autograd.grad(output, (weight, bias), grad[sample])
        torch.testing.assert_close(actual[:, sample], torch.stack(exact))


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    value, grad = operands("several blocks", torch.float32, layout)
    scale = scaled_truth(value, grad)
    assert_as_exact_as_torch(ops.affine_grad_sample(value, grad), *scale)
    last = value.transpose(1, 2), grad.transpose(1, 2)
    assert_as_exact_as_torch(ops.affine_last_grad_sample(*last), *scale)


def test_a_large_mean_does_not_cancel() -> None:
    """sum G x - mean * sum G would lose every digit here."""
    value, grad = operands("odd", torch.float32)
    value = value + 10000
    mean, rstd = statistics(value, 3)
    actual = ops.normalization_grad_sample(value, grad, mean, rstd)
    exact = ops.normalization_grad_sample(*(x.double() for x in (value, grad, mean, rstd)))
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_bad_sample_stays_alone() -> None:
    value, grad = operands("odd", torch.float32)
    clean = ops.affine_clipped_grad(value[1:], grad[1:], torch.ones(2))
    value[0] = torch.inf
    grad[0] = torch.nan
    factor = torch.tensor([0.0, 1.0, 1.0])
    assert torch.equal(ops.affine_clipped_grad(value, grad, factor), clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_library_registration(backend: str, layout: str) -> None:
    value, grad = operands("odd", torch.float32, layout)
    library = torch.ops.dpkernels
    calls = {
        "affine_grad_sample": (value, grad),
        "affine_last_grad_sample": (value, grad),
        "bias_grad_sample": (grad,),
        "bias_last_grad_sample": (grad,),
        "affine_norm_sq": (value, grad),
        "affine_clipped_grad": (value, grad, torch.ones(3)),
        "normalization_grad_sample": (value, grad, *statistics(value, 3)),
        "normalization_last_grad_sample": (value, grad, *torch.rand(2, 3, 6)),
        "normalization_statistics": (value, 3, 1e-5),
    }
    with ops.use_backend(backend):
        for name, args in calls.items():
            torch.library.opcheck(getattr(library, name).default, args)


def test_mutation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is off by one percent fails the comparison that guards the suite."""
    honest = cpu.normalization_grad_sample
    monkeypatch.setattr(cpu, "normalization_grad_sample", lambda *args: honest(*args) * 1.01)
    with pytest.raises(pytest.fail.Exception, match="elements pass"):
        test_normalization("odd", torch.float32, "cpu")


@pytest.mark.parametrize(
    ("shape", "named"),
    [((3, 4), "mean"), ((2, 3), "mean"), ((3, 0), "mean"), ((3,), "mean")],
)
def test_wrong_statistics_are_named(shape: tuple[int, ...], named: str) -> None:
    value, grad = operands("odd", torch.float32)
    with pytest.raises(ValueError, match=f"^{named}"):
        ops.normalization_grad_sample(value, grad, torch.zeros(shape), torch.zeros(shape))


def test_wrong_shapes_are_named() -> None:
    value, grad = operands("odd", torch.float32)
    with pytest.raises(ValueError, match=r"^grad_output"):
        ops.affine_grad_sample(value, grad[:, :2])
    with pytest.raises(ValueError, match=r"^rstd"):
        ops.normalization_grad_sample(value, grad, torch.zeros(3, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"^groups"):
        ops.normalization_statistics(value, 4, 1e-5)
    with pytest.raises(ValueError, match=r"^eps"):
        ops.normalization_statistics(value, 3, -1.0)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize(
    ("op", "name"),
    [(ops.bias_last_grad_sample, "grad_output"), (ops.affine_last_grad_sample, "normalized")],
)
def test_another_number_of_axes_is_named_for_channels_last_too(
    op: Any, name: str, shape: tuple[int, ...]
) -> None:
    operands = [torch.ones(shape)] * (1 if name == "grad_output" else 2)
    with pytest.raises(ValueError, match=rf"{name}: shape \[{shape[0]}.*expected 3 axes"):
        op(*operands)
