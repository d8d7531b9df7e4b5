"""Linear gradients: every backend and CPU strategy against one sample at a time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from dpkernels import ops
from dpkernels.ops import native
from dpkernels.ops.linear import cpu, gram, library
from tests.ops import shapes
from tests.ops.compare import BACKENDS, DTYPES, assert_as_exact_as_torch, skip_unless_runs


def operands(
    name: str, dtype: torch.dtype, layout: str = "contiguous"
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, positions, inputs, outputs = shapes.LINEAR[name]
    generator = torch.Generator().manual_seed(11)
    drawn = (
        torch.randn(batch, positions, n, generator=generator, dtype=torch.float64).to(dtype)
        for n in (inputs, outputs)
    )
    activations, grad_output = (shapes.LAYOUTS[layout](each) for each in drawn)
    return activations, grad_output


def microbatch(activations: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """Each sample alone through autograd: [B, O, I] in the operands' dtype."""
    shape = (grad_output.shape[2], activations.shape[2])
    grads = activations.new_zeros((len(activations), *shape))
    for sample, (act, grad) in enumerate(zip(activations, grad_output, strict=True)):
        weight = activations.new_zeros(shape, requires_grad=True)
        (grads[sample],) = torch.autograd.grad(F.linear(act, weight), weight, grad)
    return grads


def truths(
    activations: torch.Tensor, grad_output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-sample gradients at the dtype, exactly, and of absolute values."""
    wide = activations.double(), grad_output.double()
    return (
        microbatch(activations, grad_output),
        microbatch(*wide),
        microbatch(wide[0].abs(), wide[1].abs()),
    )


def square_sums(grads: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(grad.flatten(1).square().sum(1) for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", shapes.LINEAR)
def test_equals_one_sample_at_a_time(name: str, dtype: torch.dtype, backend: str) -> None:
    activations, grad_output = operands(name, dtype)
    skip_unless_runs(ops.linear_grad_sample, backend, activations, grad_output)
    grads = truths(activations, grad_output)
    factor = torch.linspace(0.2, 1.0, len(activations), dtype=torch.float32)
    clipped = tuple(torch.einsum("b,boi->oi", factor.to(g.dtype), g) for g in grads)
    with ops.use_backend(backend):
        actual = ops.linear_grad_sample(activations, grad_output)
        norm_sq = ops.linear_norm_sq(activations, grad_output)
        total = ops.linear_clipped_grad(activations, grad_output, factor)
    assert_as_exact_as_torch(actual, *grads)
    assert_as_exact_as_torch(norm_sq, *square_sums(grads))
    assert_as_exact_as_torch(total, *clipped)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", shapes.LINEAR)
def test_library_calls_on_the_device(name: str, dtype: torch.dtype) -> None:
    """cuBLAS as a backend of its own: 16-bit operands as they are, answers in float32."""
    activations, grad_output = operands(name, dtype)
    grads = truths(activations, grad_output)
    with ops.use_backend("library"):
        found = ops.linear_grad_sample(activations.cuda(), grad_output.cuda()).cpu()
        norm_sq = ops.linear_norm_sq(activations.cuda(), grad_output.cuda()).cpu()
    assert_as_exact_as_torch(found, *grads)
    assert_as_exact_as_torch(norm_sq, *square_sums(grads))


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
@pytest.mark.parametrize("name", ["odd", "one position", "several Gram tiles"])
def test_any_memory_layout(name: str, layout: str) -> None:
    activations, grad_output = operands(name, torch.float32, layout)
    grads = truths(activations, grad_output)
    assert_as_exact_as_torch(ops.linear_grad_sample(activations, grad_output), *grads)
    assert_as_exact_as_torch(ops.linear_norm_sq(activations, grad_output), *square_sums(grads))


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("name", ["odd", "one sample", "empty batch", "no positions"])
def test_positions_first_in_memory(name: str, which: tuple[bool, bool]) -> None:
    """[T, B, F] seen as [B, T, F], as recurrent layers have it: one operand or both."""
    activations, grad_output = (
        tensor.transpose(0, 1).contiguous().transpose(0, 1) if first else tensor
        for tensor, first in zip(operands(name, torch.float32), which, strict=True)
    )
    grads = truths(activations, grad_output)
    for lowest in (0.0, 0.2):
        factor = torch.linspace(lowest, 1.0, len(activations))
        sums = tuple(torch.einsum("b,boi->oi", factor.to(grad.dtype), grad) for grad in grads)
        clipped = ops.linear_clipped_grad(activations, grad_output, factor)
        assert_as_exact_as_torch(clipped, *sums)
    assert_as_exact_as_torch(ops.linear_grad_sample(activations, grad_output), *grads)
    assert_as_exact_as_torch(ops.linear_norm_sq(activations, grad_output), *square_sums(grads))


@pytest.mark.parametrize("form", [library.gram_norm_sq, library.recompute_norm_sq])
@pytest.mark.parametrize("name", shapes.LINEAR)
def test_every_norm_strategy(name: str, form: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "SCRATCH_ELEMENTS", 3000)
    monkeypatch.setattr(gram, "LIBRARY_TILE", 5)
    for dtype in (torch.float32, torch.float64):
        activations, grad_output = operands(name, dtype)
        grads = truths(activations, grad_output)
        assert_as_exact_as_torch(form(activations, grad_output), *square_sums(grads))  # type: ignore[operator]


@pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
@pytest.mark.parametrize("layout", shapes.LAYOUTS)
@pytest.mark.parametrize("name", shapes.LINEAR)
def test_the_compiled_gram(name: str, layout: str, threads: None) -> None:
    """Any length and any layout; the same bits with any number of threads."""
    activations, grad_output = operands(name, torch.float32, layout)
    torch.set_num_threads(1)
    norm_sq = cpu.gram_norm_sq(activations, grad_output)
    assert_as_exact_as_torch(norm_sq, *square_sums(truths(activations, grad_output)))
    torch.set_num_threads(3)
    assert torch.equal(cpu.gram_norm_sq(activations, grad_output), norm_sq)


@pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
@pytest.mark.parametrize("name", native.instruction_sets())
def test_every_instruction_set_stays_within_the_margin(name: str) -> None:
    """In a process of its own: the loader picks the instruction set once."""
    environ = {**os.environ, "DPKERNELS_INSTRUCTION_SET": name}
    command = [sys.executable, "-c", _WITHIN_THE_MARGIN, name]
    subprocess.run(command, check=True, env=environ, timeout=120)


_WITHIN_THE_MARGIN = """
import sys, torch
from dpkernels.ops import native
from dpkernels.ops.linear import cpu
assert native.load("cpu").instruction_set == sys.argv[1], native.load("cpu")
generator = torch.Generator().manual_seed(3)
for positions in (1, 2, 3, 4, 7, 8, 9, 13, 16, 17, 31, 33, 48, 127, 129):
    for inputs, outputs in ((1, 1), (1, 17), (17, 2), (33, 16), (130, 5), (2000, 17)):
        drawn = [torch.randn(3, positions, n, generator=generator) for n in (inputs, outputs)]
        drawn[1][1] *= 1e-3
        drawn[1][:, 1::2] = -drawn[1][:, : positions - 1 : 2]  # with equal inputs, these cancel
        drawn[0][2, 1::2] = drawn[0][2, : positions - 1 : 2]
        wide = [each.double() for each in drawn]
        grams = [each @ each.mT for each in wide]
        exact = (grams[0] * grams[1]).sum((1, 2)).clamp(min=0)
        norms = [each.norm(dim=2) for each in wide]
        largest = (norms[0] * norms[1]).sum(1).square()
        found = cpu.gram_norm_sq(*drawn).double()
        allowed = (inputs + outputs + 8) * 2.0**-24 * largest + 2.0**-24 * exact
        assert ((found - exact).abs() <= allowed).all(), (positions, inputs, outputs)
        assert (found >= 0).all()
"""


def test_the_gram_form_costs_what_its_backend_forms() -> None:
    """Ours forms half of both Grams and the tiles on the diagonal, the library all of 256."""
    pair = torch.zeros(2, 128, 3), torch.zeros(2, 128, 5)
    whole = 2 * 2.0 * 128 * 128 * (3 + 5)
    with ops.use_backend("library"):
        assert gram.gram_flops(*pair) == whole
    assert gram.gram_flops(*(each.double() for each in pair)) == whole
    if native.why_not_cpu() is None:
        assert whole / 2 < gram.gram_flops(*pair) < 0.6 * whole


def test_calls_of_one_module_add_before_the_norm() -> None:
    """Calls concatenated along the positions give the norm of the sum of their gradients."""
    first, second = operands("odd", torch.float64), operands("odd", torch.float64)
    second = (second[0].flip(1), second[1] * 0.3)
    both = tuple(torch.cat(pair, dim=1) for pair in zip(first, second, strict=True))
    exact = (microbatch(*first) + microbatch(*second)).flatten(1).square().sum(1)
    torch.testing.assert_close(ops.linear_norm_sq(*both), exact)


@pytest.mark.parametrize("name", ["one position", "odd", "several Gram tiles"])
def test_a_bad_sample_stays_alone(name: str) -> None:
    activations, grad_output = operands(name, torch.float32)
    clean = ops.linear_norm_sq(activations, grad_output)
    rest = ops.linear_clipped_grad(
        activations[1:], grad_output[1:], torch.ones(len(activations) - 1)
    )
    activations[0, 0, 0] = torch.nan
    norm_sq = ops.linear_norm_sq(activations, grad_output)
    assert norm_sq[0].isnan()
    assert torch.equal(norm_sq[1:], clean[1:])
    factor = torch.ones(len(activations))
    factor[0] = 0
    assert torch.equal(ops.linear_clipped_grad(activations, grad_output, factor), rest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_library_registration(backend: str, layout: str) -> None:
    args = operands("odd", torch.float32, layout)
    skip_unless_runs(ops.linear_grad_sample, backend, *args)
    library = torch.ops.dpkernels
    with ops.use_backend(backend):
        torch.library.opcheck(library.linear_grad_sample.default, args)
        torch.library.opcheck(library.linear_norm_sq.default, args)
        torch.library.opcheck(library.linear_clipped_grad.default, (*args, torch.ones(3)))


def test_mutation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that is off by one percent fails the comparison that guards the suite."""
    honest = cpu.linear_norm_sq
    monkeypatch.setattr(cpu, "linear_norm_sq", lambda *args: honest(*args) * 1.01)
    with pytest.raises(pytest.fail.Exception, match="elements pass"):
        test_equals_one_sample_at_a_time("odd", torch.float32, "cpu")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3, 4)), "activations"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 4, 4)), "grad_output"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int32)), "grad_output"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(3)), "clip_factor"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2).half()), "clip_factor"),
    ],
)
def test_wrong_arguments_are_named(args: tuple[torch.Tensor, ...], named: str) -> None:
    op = ops.linear_norm_sq if len(args) == 2 else ops.linear_clipped_grad
    with pytest.raises(ValueError, match=f"^{named}"):
        op(*args)
