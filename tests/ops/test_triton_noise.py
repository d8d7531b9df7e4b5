"""Noise in Triton: the words of RFC 8439, the normals of the reference, nothing drawn twice."""

from __future__ import annotations

import pytest
import torch

from dpkernels import ops
from dpkernels.ops.noise import chacha20_blocks_, gaussian_noise_, standard_normals
from tests.ops.test_noise import RFC_VECTORS, key_of
from tests.ops.triton_device import MARKS, load, on_device

noise = load("dpkernels.ops.noise.triton")

pytestmark = MARKS

BLOCKS = [0, 2**32 - 3, 2**63 - 20]


@pytest.fixture(autouse=True)
def few_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs for a handful of blocks."""
    monkeypatch.setattr(noise, "LANES", 8)


@pytest.mark.parametrize("name", RFC_VECTORS)
def test_rfc_8439(name: str) -> None:
    key, (low, high, nonce_low, nonce_high), stream = RFC_VECTORS[name]
    (words,) = on_device(torch.empty(1, 16, dtype=torch.int32))
    with ops.use_backend("triton"):
        chacha20_blocks_(words, key_of(key), low + (high << 32), nonce_low + (nonce_high << 32))
    assert words.cpu().numpy().tobytes().hex() == stream


@pytest.mark.parametrize("block", BLOCKS)
def test_same_words_and_normals_as_the_reference(key: torch.Tensor, block: int) -> None:
    """The counter carries into its high word inside a program and between programs."""
    drawn = []
    for backend in ("reference", "triton"):
        (words,) = on_device(torch.empty(11, 16, dtype=torch.int32))
        with ops.use_backend(backend):
            chacha20_blocks_(words, key, block, nonce=5)
            drawn.append((words, standard_normals(words)))
    (words, normals), (triton_words, triton_normals) = drawn
    assert torch.equal(words, triton_words)
    torch.testing.assert_close(triton_normals, normals, rtol=1e-6, atol=1e-6)


def test_extreme_words_stay_finite_and_reach_the_tail() -> None:
    """A radius of all zeros or all ones: the farthest and the nearest pair, never inf or NaN."""
    ends = [0, -1, -(2**31), 2**31 - 1]
    rows = torch.tensor([[low, high, low, high] * 4 for low in ends for high in ends])
    (words,) = on_device(rows.to(torch.int32))
    with ops.use_backend("reference"):
        exact = standard_normals(words, torch.float64)
    with ops.use_backend("triton"):
        normals = standard_normals(words)
    assert normals.isfinite().all()
    assert 9.4 < normals.abs().max() <= 9.5
    torch.testing.assert_close(normals.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 13), (67,)])
def test_noise_added_equals_the_reference(key: torch.Tensor, shape: tuple[int, ...]) -> None:
    start = torch.full(shape, 3.0)
    (noisy,) = on_device(start.clone())
    with ops.use_backend("reference"):
        expected = gaussian_noise_(start.clone(), 1.5, key, 2**32 - 1)
    with ops.use_backend("triton"):
        assert gaussian_noise_(noisy, 1.5, key, 2**32 - 1) is noisy
    torch.testing.assert_close(noisy.cpu(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_tensors(key: torch.Tensor, dtype: torch.dtype) -> None:
    """Off by at most one unit: Triton's interpreter truncates to bfloat16, devices round."""
    (noisy,) = on_device(torch.ones(67, dtype=dtype))
    exact = gaussian_noise_(torch.ones(67, dtype=torch.float64), 0.5, key, 9)
    with ops.use_backend("triton"):
        gaussian_noise_(noisy, 0.5, key, 9)
    torch.testing.assert_close(noisy.cpu().double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_noise_follows_the_flat_index_whatever_the_strides(key: torch.Tensor) -> None:
    plain, turned = on_device(torch.zeros(6, 5), torch.zeros(5, 6))
    turned = turned.T
    with ops.use_backend("triton"):
        gaussian_noise_(plain, 1.0, key, 4)
        version = turned._version
        gaussian_noise_(turned, 1.0, key, 4)
    assert torch.equal(plain, turned)
    assert turned._version > version


def test_no_noise_for_a_standard_deviation_of_zero(key: torch.Tensor) -> None:
    (tensor,) = on_device(torch.ones(9))
    with ops.use_backend("triton"):
        gaussian_noise_(tensor, 0.0, key, 0)
    assert torch.equal(tensor, torch.ones_like(tensor))


def test_double_precision_is_refused_by_name(key: torch.Tensor) -> None:
    tensor, words = on_device(torch.ones(9).double(), torch.zeros(1, 16, dtype=torch.int32))
    with ops.use_backend("triton"):
        with pytest.raises(ops.BackendUnavailable, match="float64"):
            gaussian_noise_(tensor, 1.0, key, 0)
        with pytest.raises(ops.BackendUnavailable, match="float64"):
            standard_normals(words, torch.float64)
