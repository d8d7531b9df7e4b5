"""The same inputs give the same bits twice: every op, every backend, several threads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dpkernels.ops import native
from dpkernels.ops.registry import all_ops, use_backend
from tests.ops.compare import skip_unless_runs
from tests.ops.triton_device import DEVICE, load

load("dpkernels.ops.linear.triton")  # decides about the interpreter before a kernel is defined

_RANDOM = torch.Generator().manual_seed(5)
KEY = torch.tensor([1, -2, 3, 4])


def _values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_RANDOM)


def _integers(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=_RANDOM).to(torch.int32)


CHANNELS = _values(3, 4, 150), _values(3, 4, 150)
LAST = _values(3, 40, 6), _values(3, 40, 6)
FACTOR = torch.tensor([0.3, 1.0, 0.7])
CONV = ([4, 3, 3, 3], [1, 1], [1, 1], [1, 1], 1)
IMAGES = _values(3, 3, 9, 10), _values(3, 4, 9, 10)
IDS = torch.randint(0, 6, (3, 30), generator=_RANDOM)
STORED = _values(3, 70)
ROWS = _values(3, 33, 20), _values(3, 33, 17)

CASES: dict[str, tuple[Any, ...]] = {
    "affine_grad_sample": CHANNELS,
    "affine_last_grad_sample": LAST,
    "bias_grad_sample": CHANNELS[:1],
    "bias_last_grad_sample": LAST[:1],
    "normalization_grad_sample": (*CHANNELS, _values(3, 2), _values(3, 2).abs()),
    "normalization_last_grad_sample": (*LAST, _values(3, 40), _values(3, 40).abs()),
    "normalization_statistics": (CHANNELS[0], 2, 1e-5),
    "fingerprint": CHANNELS[:1],
    "affine_norm_sq": CHANNELS,
    "affine_clipped_grad": (*CHANNELS, FACTOR),
    "gaussian_noise_": (_values(999), 1.5, KEY, 3),
    "chacha20_blocks_": (_integers(40, 16), KEY, 3),
    "standard_normals": (_integers(40, 16),),
    "discrete_gaussians": (_integers(40, 16),),
    "clip_factor": (_values(3).square(), 0.5),
    "weighted_sum_": (_values(70), STORED, FACTOR),
    "finish_grad_": (_values(70), STORED, FACTOR, 1.5, 0.1, KEY, 3, True),
    "finish_grads_": (
        [_values(70), _values(5)], [STORED, _values(3, 5)], [FACTOR, FACTOR], 1.5, 0.1, KEY,
        [3, 20], [True, False],
    ),
    "conv_grad_sample": (*IMAGES, *CONV),
    "conv_norm_sq": (*IMAGES, *CONV),
    "conv_clipped_grad": (*IMAGES, FACTOR, *CONV),
    "embedding_norm_sq": (IDS, _values(3, 30, 7), 2),
    "embedding_grad_sample": (IDS, _values(3, 30, 7), 6, 2),
    "embedding_clipped_grad": (IDS, _values(3, 30, 7), FACTOR, 6, 2),
    "lstm": (
        _values(5, 4), _values(12, 4), _values(12, 3), None, _values(12), _values(3, 3),
        _values(3, 3), [3, 2], False,
    ),
    "lstm_backward": (
        _values(5, 3), _values(3, 3), _values(3, 3), _values(5, 12), _values(5, 3), _values(5, 3),
        _values(12, 3), None, [3, 2], False,
    ),
    "linear_norm_sq": ROWS,
    "linear_grad_sample": ROWS,
    "linear_clipped_grad": (*ROWS, FACTOR),
}  # fmt: skip

BACKENDS = [
    "reference",
    "library",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
    ),
    pytest.param("triton", marks=[pytest.mark.gpu] if DEVICE == "cuda" else []),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def test_every_op_is_here() -> None:
    assert set(CASES) == set(all_ops())


def _bits(result: Any) -> list[torch.Tensor]:
    return [t.clone() for t in ([result] if isinstance(result, torch.Tensor) else result)]


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [_moved(each, device) for each in value]
    if isinstance(value, torch.Tensor) and value is not KEY:
        return value.to(device, copy=True)
    return copy.copy(value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_same_bits_twice(name: str, backend: str, threads: None) -> None:
    op = all_ops()[name]
    device = "cuda" if backend == "cuda" else DEVICE if backend == "triton" else "cpu"
    reason = op.why_not(backend)
    if reason is not None:
        assert "implementation" in reason, reason
        assert backend != "reference"
        return
    torch.set_num_threads(3)
    found = []
    for _ in range(2):
        arguments = [_moved(value, device) for value in CASES[name]]
        skip_unless_runs(op, backend, *arguments)
        with use_backend(backend):
            found.append(_bits(op(*arguments)))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
        assert first.isfinite().all()
