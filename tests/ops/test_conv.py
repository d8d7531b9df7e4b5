"""Convolution gradients: every backend and CPU strategy against one sample at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dpkernels import ops
from dpkernels.ops import native
from dpkernels.ops.conv import cpu, gram, library, tiles
from dpkernels.ops.conv.geometry import Geometry
from tests.ops import shapes
from tests.ops.compare import BACKENDS, DTYPES, assert_as_exact_as_torch, skip_unless_runs, tf32

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FORMS = {
    "tiles": tiles.grad_sample,
    "grouped": library.grouped_grad_sample,
    "looped": library.looped_grad_sample,
}


def operands(
    case: shapes.Conv, dtype: torch.dtype, layout: str = "contiguous"
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    drawn = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in (
            (case.batch, case.channels_in, *case.size),
            (case.batch, case.channels_out, *case.output),
        )
    )
    input, grad_output = (shapes.LAYOUTS[layout](each) for each in drawn)
    return input, grad_output


def microbatch(input: torch.Tensor, grad_output: torch.Tensor, case: shapes.Conv) -> torch.Tensor:
    """Each sample alone through autograd: [B, *weight_shape] in the operands' dtype."""
    grads = input.new_zeros((case.batch, *case.weight_shape))
    reached = tuple(slice(0, n) for n in case.output)
    for sample in range(case.batch):
        weight = input.new_zeros(case.weight_shape, requires_grad=True)
        output = CONV[len(case.size)](
            input[sample : sample + 1],
            weight,
            None,
            case.stride,
            case.padding,
            case.dilation,
            case.groups,
        )[(slice(None), slice(None), *reached)]
        (grads[sample],) = torch.autograd.grad(output, weight, grad_output[sample : sample + 1])
    return grads


class Truth:
    """Gradients of a case at its dtype, exactly, and the size of what is added up."""

    def __init__(self, input: torch.Tensor, grad_output: torch.Tensor, case: shapes.Conv):
        self.plain = microbatch(input, grad_output, case)
        wide = input.double(), grad_output.double()
        self.exact = microbatch(*wide, case)
        self.magnitude = microbatch(wide[0].abs(), wide[1].abs(), case)

    def norm_sq(self) -> tuple[torch.Tensor, ...]:
        return tuple(g.flatten(1).square().sum(1) for g in (self.plain, self.exact, self.magnitude))

    def clipped(self, factor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.einsum("b,b...->...", factor.to(g.dtype), g)
            for g in (self.plain, self.exact, self.magnitude)
        )

    def grads(self) -> tuple[torch.Tensor, ...]:
        return self.plain, self.exact, self.magnitude


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", shapes.CONV)
def test_equals_one_sample_at_a_time(name: str, dtype: torch.dtype, backend: str) -> None:
    case = shapes.CONV[name]
    input, grad_output = operands(case, dtype)
    skip_unless_runs(ops.conv_grad_sample, backend, input, grad_output, *case.geometry)
    truth = Truth(input, grad_output, case)
    factor = torch.linspace(0.2, 1.0, case.batch, dtype=torch.float32)
    with ops.use_backend(backend):
        grads = ops.conv_grad_sample(input, grad_output, *case.geometry)
        norm_sq = ops.conv_norm_sq(input, grad_output, *case.geometry)
        clipped = ops.conv_clipped_grad(input, grad_output, factor, *case.geometry)
    assert grads.is_contiguous()
    assert_as_exact_as_torch(grads, *truth.grads())
    assert_as_exact_as_torch(norm_sq, *truth.norm_sq())
    assert_as_exact_as_torch(clipped, *truth.clipped(factor))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", shapes.CONV)
def test_library_calls_on_the_device(name: str, dtype: torch.dtype) -> None:
    """cuDNN and cuBLAS as a backend of their own; in float64 they are the automatic choice."""
    case = shapes.CONV[name]
    operands_here = operands(case, dtype)
    moved = tuple(operand.cuda() for operand in operands_here)
    truth = Truth(*operands_here, case)
    with tf32(False):
        if dtype == torch.float64:
            assert ops.conv_grad_sample.backend(*moved, *case.geometry) == "library"
        with ops.use_backend("library"):
            grads = ops.conv_grad_sample(*moved, *case.geometry).cpu()
            norm_sq = ops.conv_norm_sq(*moved, *case.geometry).cpu()
    assert_as_exact_as_torch(grads, *truth.grads())
    assert_as_exact_as_torch(norm_sq, *truth.norm_sq())


@pytest.mark.parametrize("layout", [name for name in shapes.LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("name", ["1d", "2d, stride 2, remainder", "2d, depthwise", "3d"])
def test_any_memory_layout(name: str, layout: str) -> None:
    case = shapes.CONV[name]
    input, grad_output = operands(case, torch.float32, layout)
    truth = Truth(input, grad_output, case)
    for form in FORMS.values():
        if form is tiles.grad_sample and native.why_not_cpu():
            continue
        assert_as_exact_as_torch(form(input, grad_output, case.geometry), *truth.grads())
    norm_sq = ops.conv_norm_sq(input, grad_output, *case.geometry)
    assert_as_exact_as_torch(norm_sq, *truth.norm_sq())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name, case in shapes.CONV.items() if case.batch])
def test_every_cpu_form(name: str, form: str) -> None:
    """The dispatch rule sends small shapes to one form only; here each takes them all."""
    case = shapes.CONV[name]
    if form == "tiles" and native.why_not_cpu():
        pytest.skip(native.why_not_cpu())
    input, grad_output = operands(case, torch.float32)
    truth = Truth(input, grad_output, case)
    actual = FORMS[form](input, grad_output, case.geometry)
    assert_as_exact_as_torch(actual, *truth.grads())


@pytest.mark.parametrize(
    "name",
    [n for n, case in shapes.CONV.items() if case.batch and math.prod(case.size) <= 256],
)
def test_channel_gram(name: str) -> None:
    case = shapes.CONV[name]
    for dtype in (torch.float64, torch.float32):
        input, grad_output = operands(case, dtype)
        truth = Truth(input, grad_output, case)
        actual = gram.channel_gram_norm_sq(input, grad_output, case.geometry)
        assert_as_exact_as_torch(actual, *truth.norm_sq())


def test_gram_is_chosen_where_it_needs_fewer_operations() -> None:
    deep = Geometry((256, 256, 3, 3, 3), (1,) * 3, (1,) * 3, (1,) * 3, 1)
    wide = Geometry((16, 16, 3, 3, 3), (1,) * 3, (1,) * 3, (1,) * 3, 1)
    small, large = torch.Size((2, 256, 3, 3, 3)), torch.Size((2, 16, 48, 48, 48))
    assert gram.is_cheaper(small, small, deep)
    assert not gram.is_cheaper(large, large, wide)


@pytest.mark.skipif(native.why_not_cpu() is not None, reason=str(native.why_not_cpu()))
def test_the_kernel_is_left_alone_where_it_cannot_win() -> None:
    geometry = Geometry((4, 4, 3), (1,), (1,), (1,), 1)
    short, long = torch.zeros(1, 4, 512), torch.zeros(1, 4, tiles.LONGEST_ROW + 1)
    assert not tiles.is_faster(long, long, geometry, folds_well=True)
    assert not tiles.is_faster(short.double(), short.double(), geometry, folds_well=True)
    if native.why_not_cpu() is None and native.extension(short).instruction_set != "baseline":
        assert tiles.is_faster(short, short, geometry, folds_well=True)


@pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
@pytest.mark.usefixtures("threads")
def test_threads_do_not_change_a_bit() -> None:
    case = shapes.CONV["3d, several blocks"]
    input, grad_output = operands(case, torch.float32)
    torch.set_num_threads(1)
    alone = tiles.grad_sample(input, grad_output, case.geometry)
    torch.set_num_threads(3)
    assert torch.equal(tiles.grad_sample(input, grad_output, case.geometry), alone)


@pytest.mark.parametrize("name", ["2d", "2d, one tap", "2d, stride 2, remainder", "3d"])
def test_a_bad_sample_stays_alone(name: str) -> None:
    """NaN in one sample reaches no other gradient, and no sum when its factor is 0."""
    case = shapes.CONV[name]
    input, grad_output = operands(case, torch.float32)
    clean = ops.conv_grad_sample(input, grad_output, *case.geometry)
    input[0] = torch.nan
    grad_output[0, 0] = torch.inf
    grads = ops.conv_grad_sample(input, grad_output, *case.geometry)
    assert torch.equal(grads[1:], clean[1:])
    assert not grads[0].isfinite().any()
    factor = torch.ones(case.batch)
    factor[0] = 0
    clipped = ops.conv_clipped_grad(input, grad_output, factor, *case.geometry)
    torch.testing.assert_close(clipped, clean[1:].sum(0))


@pytest.mark.skipif(native.why_not_cpu() is not None, reason=str(native.why_not_cpu()))
def test_scratch_of_a_bad_call_does_not_leak() -> None:
    """The tile kernel's scratch is reused: what a NaN left there must not be read."""
    case = shapes.CONV["3d, several blocks"]
    input, grad_output = operands(case, torch.float32)
    clean = tiles.grad_sample(input, grad_output, case.geometry)
    tiles.grad_sample(torch.full_like(input, torch.nan), grad_output, case.geometry)
    assert torch.equal(tiles.grad_sample(input, grad_output, case.geometry), clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_library_registration(backend: str) -> None:
    case = shapes.CONV["2d, mixed axes"]
    for layout in ("contiguous", "sliced"):
        input, grad_output = operands(case, torch.float32, layout)
        factor = torch.ones(case.batch)
        with ops.use_backend(backend):
            for op in ("conv_grad_sample", "conv_norm_sq"):
                args = (input, grad_output, *case.geometry)
                torch.library.opcheck(getattr(torch.ops.dpkernels, op).default, args)
            args = (input, grad_output, factor, *case.geometry)
            torch.library.opcheck(torch.ops.dpkernels.conv_clipped_grad.default, args)


def test_mutation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that is off by one percent fails the comparison that guards the suite."""
    honest = cpu.conv_norm_sq
    monkeypatch.setattr(cpu, "conv_norm_sq", lambda *args: honest(*args) * 1.01)
    with pytest.raises(pytest.fail.Exception, match="elements pass"):
        test_equals_one_sample_at_a_time("2d", torch.float32, "cpu")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight_shape": [4, 2, 3, 3]}, "input"),
        ({"weight_shape": [4, 3]}, "weight_shape"),
        ({"stride": [1]}, "stride"),
        ({"stride": [0, 1]}, "stride"),
        ({"padding": [-1, 0]}, "padding"),
        ({"dilation": [1, 0]}, "dilation"),
        ({"groups": 3}, "groups"),
        ({"padding": [0, 0]}, "grad_output"),
        ({"grad_output": torch.zeros(2, 5, 5, 5)}, "grad_output"),
        ({"input": torch.zeros(2, 3, 5, 5, dtype=torch.int64)}, "input"),
        ({"input": torch.zeros(2, 3, 5)}, "input"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], named: str) -> None:
    arguments: dict[str, object] = {
        "input": torch.zeros(2, 3, 5, 5),
        "grad_output": torch.zeros(2, 4, 5, 5),
        "weight_shape": [4, 3, 3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
    }
    with pytest.raises(ValueError, match=f"^{named}"):
        ops.conv_grad_sample(*(arguments | change).values())
