"""The registry: automatic choice, forced backends and their reasons, torch.compile."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from dpkernels import ops
from dpkernels.ops import native, registry
from dpkernels.ops.clip import clip_factor, finish_grad_
from dpkernels.ops.noise import gaussian_noise_
from dpkernels.ops.registry import BackendUnavailable, all_ops, use_backend
from tests.ops.compare import tf32

NORM_SQ = torch.tensor([4.0])
built = pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")


@pytest.fixture(autouse=True)
def _no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPKERNELS_BACKEND", raising=False)


@built
def test_automatic_choice_takes_the_compiled_backend() -> None:
    assert clip_factor.backend(NORM_SQ, 1.0) == "cpu"


def test_automatic_choice_passes_over_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_module", _without("cpu", registry._module))
    assert clip_factor.backend(NORM_SQ, 1.0) == "reference"
    assert clip_factor(NORM_SQ, 1.0).item() == pytest.approx(0.5)


def test_no_backend_at_all_names_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_module", lambda family, backend: f"{backend} is on holiday")
    with pytest.raises(BackendUnavailable, match="cpu is on holiday.*reference is on holiday"):
        clip_factor(NORM_SQ, 1.0)


def _without(absent: str, module):
    def find(family: str, backend: str):
        return f"{absent} is not built" if backend == absent else module(family, backend)

    return find


def test_a_forced_backend_runs_or_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_module", _without("cpu", registry._module))
    with use_backend("reference"):
        assert clip_factor.backend(NORM_SQ, 1.0) == "reference"
    with (
        use_backend("cpu"),
        pytest.raises(BackendUnavailable, match="forced, but cpu is not built"),
    ):
        clip_factor(NORM_SQ, 1.0)


def test_environment_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPKERNELS_BACKEND", "reference")
    assert clip_factor.backend(NORM_SQ, 1.0) == "reference"
    with use_backend("auto"):
        assert clip_factor.backend(NORM_SQ, 1.0) == clip_factor.preferred("cpu")
    monkeypatch.setenv("DPKERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match="backend='gpu'.*reference, library, cpu, triton, cuda"):
        clip_factor(NORM_SQ, 1.0)


def test_use_backend_nests_and_restores() -> None:
    with use_backend("reference"):
        with use_backend("auto"):
            assert registry.forced_backend() is None
        assert registry.forced_backend() == "reference"
    assert registry.forced_backend() is None
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    assert registry.forced_backend() is None
    with pytest.raises(ValueError, match="backend='fpga'"), use_backend("fpga"):
        pass


@built
def test_a_backend_refuses_the_other_device() -> None:
    """A compiled CPU kernel must never see an address on another device."""
    reason = clip_factor.why_not("cpu", torch.empty(3, device="meta"), 1.0)
    assert "meta" in reason
    assert clip_factor.why_not("cpu", norm_sq=torch.empty(3, device="meta"), max_grad_norm=1.0)


@built
def test_candidates_are_what_runs_with_the_automatic_choice_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operands = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
    assert ops.linear_grad_sample.candidates(*operands) == ("cpu", "library")
    with use_backend("reference"):
        assert ops.linear_grad_sample.candidates(*operands) == ("reference",)
    monkeypatch.setattr(registry, "_module", _without("cpu", registry._module))
    assert ops.linear_grad_sample.candidates(*operands) == ("library",)
    assert clip_factor.candidates(NORM_SQ, 1.0) == ("reference",)


def test_the_library_keeps_norms_and_sums_of_tf32_products_together() -> None:
    """On CUDA devices with TF32 it forms per-sample gradients only."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        single = torch.empty(2, 3, 8, 8, device="cuda"), torch.empty(2, 4, 6, 6, device="cuda")
    double = tuple(operand.double() for operand in single)
    geometry = ([4, 3, 3, 3], [1, 1], [0, 0], [1, 1], 1)
    with tf32(True):
        assert ops.conv_grad_sample.why_not("library", *single, *geometry) is None
        assert "TF32" in ops.conv_norm_sq.why_not("library", *single, *geometry)
        assert ops.conv_norm_sq.why_not("library", *double, *geometry) is None
    with tf32(False):
        assert ops.conv_norm_sq.why_not("library", *single, *geometry) is None


def test_cuda_says_why_not() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert clip_factor.why_not("cuda") == "no CUDA device is available to PyTorch"


def test_arguments_are_checked_before_any_backend() -> None:
    with use_backend("triton"), pytest.raises(ValueError, match="max_grad_norm=-1"):
        clip_factor(NORM_SQ, -1)


def test_callers_pass_the_fields_of_named_tuples() -> None:
    """Positions or names, the same schema for torch; implementations get the tuple."""
    flat = ["input", "grad_output", "weight_shape", "stride", "padding", "dilation", "groups"]
    assert list(inspect.signature(ops.conv_norm_sq).parameters) == flat
    schema = torch.ops.dpkernels.conv_norm_sq.default._schema
    assert [argument.name for argument in schema.arguments] == flat
    arguments = torch.ones(2, 3, 5), torch.ones(2, 4, 3), [4, 3, 3], [1], [0], [1], 1
    named = dict(zip(flat, arguments, strict=True))
    assert torch.equal(ops.conv_norm_sq(*arguments), ops.conv_norm_sq(**named))
    assert ops.conv_norm_sq.backend(**named) == ops.conv_norm_sq.backend(*arguments)
    with pytest.raises(TypeError, match="groups"):
        ops.conv_norm_sq(*arguments[:-1])


def test_a_module_gives_reasons_for_all_its_ops_or_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SimpleNamespace(
        affine_grad_sample=None,
        bias_grad_sample=None,
        why_not=lambda *arguments: f"{len(arguments)} arguments",
        why_not_bias_grad_sample=lambda grad_output: "its own",
    )
    monkeypatch.setattr(registry, "_module", lambda family, name: backend)
    x = torch.ones(2, 3, 4)
    assert ops.affine_grad_sample.why_not("library", x, x) == "2 arguments"
    assert ops.bias_grad_sample.why_not("library", x) == "its own"
    assert ops.bias_grad_sample.why_not("library") is None


def test_an_op_may_run_the_implementations_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    backend = SimpleNamespace(bias_grad_sample=lambda grads: found.append(grads) or grads.sum(2))
    monkeypatch.setattr(registry, "_module", lambda family, name: backend)
    grads = torch.ones(2, 3, 4)
    assert torch.equal(ops.bias_last_grad_sample(grads), torch.full((2, 4), 3.0))
    assert found[0].shape == (2, 4, 3)
    assert inspect.signature(ops.bias_last_grad_sample).return_annotation is torch.Tensor


def test_every_op_has_a_reference_and_a_docstring() -> None:
    assert {"clip_factor", "finish_grad_", "gaussian_noise_"} <= set(all_ops())
    for name, op in all_ops().items():
        assert op.why_not("reference") is None, name
        assert op.__doc__, name
        assert hasattr(torch.ops.dpkernels, name)


def test_public_ops_are_the_registered_ones() -> None:
    for name, op in all_ops().items():
        assert getattr(ops, name, op) is op


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_ops_survive_torch_compile(backend: str, key: torch.Tensor) -> None:
    """Also those that mutate: the compiled function changes and returns the same tensor."""

    def step(out: torch.Tensor, grad_sample: torch.Tensor, norm_sq: torch.Tensor) -> torch.Tensor:
        factor = clip_factor(norm_sq, 1.0)
        finish_grad_(out, grad_sample, factor, 1.0, 0.5, key, 0, True)
        return gaussian_noise_(tensor=out, noise_std=0.1, key=key, block=50) * 2

    grad_sample, norm_sq = torch.randn(3, 10), torch.tensor([0.5, 2.0, 9.0])
    plain, compiled = torch.zeros(10), torch.zeros(10)
    expected = step(plain, grad_sample, norm_sq)
    torch._dynamo.reset()
    result = torch.compile(step, backend=backend, fullgraph=True)(compiled, grad_sample, norm_sq)
    assert torch.equal(result, expected)
    assert torch.equal(compiled, plain)


def test_fresh_memory_is_poisoned_on_request(poisoned_memory: None) -> None:
    """The fixture on which the tests of ops, layers and engine rely does what it says."""
    assert torch.empty(1000).isnan().all()
    assert torch.empty_like(torch.zeros(3, 4, dtype=torch.bfloat16)).isnan().all()
    assert torch.zeros(5).new_empty(7).isnan().all()
    assert (torch.empty(10, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
