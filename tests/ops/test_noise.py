"""Noise: RFC 8439 vectors, the transform against mpmath, distribution, and no block used twice."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkernels.ops import native
from dpkernels.ops.noise import (
    NoiseSource,
    blocks_needed,
    chacha20_blocks_,
    discrete_gaussians,
    gaussian_noise_,
    standard_normals,
)
from dpkernels.ops.registry import use_backend

BACKENDS = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
COMPILED = BACKENDS[1:]


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def key_of(hexadecimal: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(hexadecimal), dtype=torch.int64)


COUNTING_KEY = "".join(f"{i:02x}" for i in range(32))
# Key, words 12 to 15 of the state, key stream: RFC 8439 section 2.3.2 and appendix A.1.
RFC_VECTORS = {
    "section 2.3.2": (
        COUNTING_KEY,
        (1, 0x09000000, 0x4A000000, 0),
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    "A.1 #1": (
        "00" * 32,
        (0, 0, 0, 0),
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    "A.1 #2": (
        "00" * 32,
        (1, 0, 0, 0),
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    "A.1 #3": (
        "00" * 31 + "01",
        (1, 0, 0, 0),
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    "A.1 #4": (
        "00ff" + "00" * 30,
        (2, 0, 0, 0),
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    "A.1 #5": (
        "00" * 32,
        (0, 0, 0, 0x02000000),
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RFC_VECTORS)
def test_rfc_8439_vectors(backend: str, name: str) -> None:
    key, words, stream = RFC_VECTORS[name]
    out = torch.empty((1, 16), dtype=torch.int32, device=device_of(backend))
    with use_backend(backend):
        chacha20_blocks_(out, key_of(key), words[0] | words[1] << 32, words[2] | words[3] << 32)
    assert out.cpu().numpy().tobytes().hex() == stream


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("block", [0, 2**32 - 5, 2**40 + 3, 2**63 - 100])
@pytest.mark.parametrize("count", [0, 1, 7, 16, 33])
def test_key_stream_equals_reference(
    backend: str, block: int, count: int, key: torch.Tensor
) -> None:
    expected = torch.empty((count, 16), dtype=torch.int32)
    with use_backend("reference"):
        chacha20_blocks_(expected, key, block, 3)
    out = torch.empty((count, 16), dtype=torch.int32, device=device_of(backend))
    with use_backend(backend):
        chacha20_blocks_(out, key, block, 3)
    assert torch.equal(out.cpu(), expected)


EXTREMES = (0, 1, 2, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 2**32, 2**64 - 2, 2**64 - 1)
ROOT_HALF = int(mpmath.mpf(2) ** 64 * mpmath.sqrt(mpmath.mpf(1) / 2))
RADII = (*EXTREMES, 12345, 2**41, ROOT_HALF - 2**40, ROOT_HALF + 2**40, 2**64 - 2**45)
ANGLES = (*EXTREMES, 2**61, 3 * 2**61, 5 * 2**61 - 2**35, 7 * 2**61 + 12345, 0xDEADBEEF12345678)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_transform_against_mpmath(backend: str, dtype: torch.dtype, relative: float) -> None:
    """At ordinary and at the most extreme words: |z| up to 9.5, down to the end of the grid."""
    pairs = [(r, a) for r in RADII for a in ANGLES]
    words = np.array([word for pair in pairs for word in pair], dtype="<u8").view("<i4")
    words = torch.from_numpy(np.tile(words.reshape(-1, 4), (1, 4)))
    with use_backend(backend):
        z = standard_normals(words.to(device_of(backend)), dtype).cpu()
    assert z.isfinite().all()
    mpmath.mp.dps = 50
    for (r, a), row in zip(pairs, z.tolist(), strict=True):
        u = (mpmath.mpf(r) + 0.5) / 2**64
        v = (mpmath.mpf(a) + 0.5) / 2**64
        radius = mpmath.sqrt(-2 * mpmath.log(u))
        expected = (radius * mpmath.cos(2 * mpmath.pi * v), radius * mpmath.sin(2 * mpmath.pi * v))
        for value, truth in zip(row, expected * 4, strict=True):
            assert abs(value - truth) <= relative * radius, (r, a, value, truth)


def test_the_radius_has_64_bits() -> None:
    words = torch.zeros((1, 16), dtype=torch.int32)
    assert standard_normals(words)[0, 0] == pytest.approx((130 * np.log(2)) ** 0.5, rel=1e-6)


SHAPES = [(0,), (1,), (7,), (8,), (9,), (127,), (128,), (129,), (2047,), (2049,), (3, 5, 7, 11), ()]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_noise_equals_reference(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], key: torch.Tensor
) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth = start.to(torch.float64, copy=True)
    with use_backend("reference"):
        gaussian_noise_(truth, 1.7, key, 11)
    out = start.clone().to(device_of(backend))
    with use_backend(backend):
        assert gaussian_noise_(out, 1.7, key, 11) is out
    tolerance = max(torch.finfo(dtype).eps, 1e-15) * (truth.abs() + 4.0)
    assert ((out.cpu().double() - truth).abs() <= tolerance).all()


@pytest.mark.parametrize("backend", COMPILED)
def test_noise_on_strided_tensors(backend: str, key: torch.Tensor) -> None:
    """Values follow the contiguous order of the tensor, whatever its strides."""
    expected = torch.zeros(6, 4, 5, 3, device=device_of(backend))
    channels_last = expected.clone(memory_format=torch.channels_last)
    base = torch.zeros(6, 4, 5, 6, device=device_of(backend))
    with use_backend(backend):
        gaussian_noise_(expected, 1.0, key, 0)
        gaussian_noise_(channels_last, 1.0, key, 0)
        gaussian_noise_(base[..., ::2], 1.0, key, 0)
    assert torch.equal(channels_last, expected)
    assert torch.equal(base[..., ::2], expected)
    assert (base[..., 1::2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_makes_eight_values(backend: str, key: torch.Tensor) -> None:
    """A call that starts k blocks later makes the same values shifted by 8 k."""
    long = torch.zeros(4000, device=device_of(backend))
    late = torch.zeros(4000 - 8 * 37, device=device_of(backend))
    with use_backend(backend):
        gaussian_noise_(long, 1.0, key, 2**32 - 100)
        gaussian_noise_(late, 1.0, key, 2**32 - 100 + 37)
    assert torch.equal(long[8 * 37 :], late)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_noise_leaves_the_tensor_alone(backend: str, key: torch.Tensor) -> None:
    tensor = torch.full((20,), float("nan"), device=device_of(backend))
    tensor[::2] = 1.0
    with use_backend(backend):
        gaussian_noise_(tensor, 0.0, key, 0)
    assert (tensor[::2] == 1.0).all()


@pytest.mark.parametrize("backend", COMPILED)
def test_in_place_writes_are_seen_by_autograd(backend: str, key: torch.Tensor) -> None:
    weight = torch.ones(9, device=device_of(backend), requires_grad=True)
    saved = torch.ones(9, device=device_of(backend))
    loss = (weight * saved).sum()
    with use_backend(backend):
        gaussian_noise_(saved, 1.0, key, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
def test_threads_do_not_change_the_noise(threads: None, key: torch.Tensor) -> None:
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        tensor = torch.zeros(50_001)
        with use_backend("cpu"):
            results.append(gaussian_noise_(tensor, 1.0, key, 5))
    assert all(torch.equal(result, results[0]) for result in results)


_OTHER_INSTRUCTION_SET = """
import sys, torch
from dpkernels.ops import native
from dpkernels.ops.noise import chacha20_blocks_, gaussian_noise_
from dpkernels.ops.registry import use_backend
assert native.load("cpu").instruction_set == sys.argv[1], native.load("cpu")
key = torch.arange(4)
for backend in ("cpu", "reference"):
    with use_backend(backend):
        words = chacha20_blocks_(torch.empty((37, 16), dtype=torch.int32), key, 2**32 - 7)
        z = gaussian_noise_(torch.zeros(1003), 1.0, key, 9)
    if backend == "cpu":
        first = words, z
assert torch.equal(first[0], words)
assert (first[1] - z).abs().max() < 2e-6
"""


@pytest.mark.skipif(native.why_not_cpu() is not None, reason="not built")
@pytest.mark.parametrize("name", native.instruction_sets())
def test_every_instruction_set(name: str) -> None:
    environ = {**os.environ, "DPKERNELS_INSTRUCTION_SET": name}
    command = [sys.executable, "-c", _OTHER_INSTRUCTION_SET, name]
    subprocess.run(command, check=True, env=environ, timeout=120)


def test_unknown_instruction_set_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPKERNELS_INSTRUCTION_SET", "avx9000")
    reason = native.load.__wrapped__("cpu")
    assert "DPKERNELS_INSTRUCTION_SET='avx9000'" in reason
    assert "baseline" in reason


# Distribution. The key is fixed, so these either hold or do not; bounds are five standard errors.

COUNT = 2**25


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    if native.why_not_cpu() is not None:
        pytest.skip("not built: the reference would take minutes")
    return gaussian_noise_(torch.zeros(COUNT), 1.0, torch.tensor([1, 2, 3, 4]), 0)


def test_moments(sample: torch.Tensor) -> None:
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        mean = sample.pow(power).mean(dtype=torch.float64).item()
        assert abs(mean - moment) < 5 * (variance / COUNT) ** 0.5, power


@pytest.mark.parametrize("probability", [1e-2, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("sign", [1, -1])
def test_tails(sample: torch.Tensor, probability: float, sign: int) -> None:
    threshold = -torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)).item()
    expected = COUNT * probability
    beyond = (sign * sample > threshold).sum().item()
    assert abs(beyond - expected) < 5 * expected**0.5


def test_bulk_is_normal(sample: torch.Tensor) -> None:
    """Chi-squared over 1000 cells of equal probability."""
    cells = torch.histc(torch.special.ndtr(sample[: 2**23].double()), bins=1000, min=0, max=1)
    expected = 2**23 / 1000
    statistic = ((cells - expected) ** 2 / expected).sum().item()
    assert abs(statistic - 999) < 5 * (2 * 999) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 16, 128])
def test_neighbours_are_independent(sample: torch.Tensor, lag: int) -> None:
    """No correlation of values, nor of their squares, within a block, between lanes or blocks."""
    part = sample[: 2**22]
    near, far = part[:-lag], part[lag:]
    bound = 5 / len(near) ** 0.5
    assert abs((near * far).mean().item()) < bound
    assert abs(((near**2 - 1) * (far**2 - 1)).mean().item()) < 2 * bound


def test_calls_and_keys_are_independent() -> None:
    source, other = NoiseSource(), NoiseSource()
    draws = [
        gaussian_noise_(torch.zeros(100_000), 1.0, *origin.take(100_000))
        for origin in (source, source, other)
    ]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        correlation = (draws[first] * draws[second]).mean().item()
        assert abs(correlation) < 6 / 100_000**0.5


# Where keys and counters come from.


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10_000), max_size=30))
def test_no_block_is_used_twice(sizes: list[int]) -> None:
    source = NoiseSource()
    end = 0
    for size in sizes:
        _, block = source.take(size)
        assert block >= end
        end = block + blocks_needed(size)
        assert 8 * (end - block) >= size


def test_counter_never_wraps() -> None:
    source = NoiseSource()
    key, _ = source.take(1)
    source._next_block = 2**63 - 2
    renewed, block = source.take(100)
    assert block == 0
    assert not torch.equal(renewed, key)


@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, lambda source: pickle.loads(pickle.dumps(source))]
)
def test_a_copy_has_its_own_key(twin) -> None:
    source = NoiseSource()
    key, _ = source.take(1000)
    other, block = twin(source).take(8)
    assert block == 0
    assert not torch.equal(other, key)


def test_the_key_is_neither_pickled_nor_printed() -> None:
    source = NoiseSource()
    key, _ = source.take(8)
    secret = key.numpy().tobytes()
    assert secret not in pickle.dumps(source)
    assert not any(str(number) in repr(source) for number in key.tolist())


def _child_key(source: NoiseSource, queue) -> None:
    key, block = source.take(8)
    queue.put((key.tolist(), block))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own_key() -> None:
    source = NoiseSource()
    source.take(80)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child_key, args=(source, queue))
    child.start()
    child_key, child_block = queue.get(timeout=60)
    child.join()
    key, block = source.take(8)
    assert child_key != key.tolist()
    assert child_block == 0
    assert block == 10


def test_threads_never_share_a_block() -> None:
    source = NoiseSource()
    taken: list[int] = []

    def work() -> None:
        taken.extend(source.take(17)[1] for _ in range(500))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(taken) == [3 * i for i in range(4000)]


# Bad input.

GOOD = {"noise_std": 1.0, "key": torch.zeros(4, dtype=torch.int64), "block": 0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_std", -1.0),
        ("noise_std", float("nan")),
        ("noise_std", float("inf")),
        ("key", torch.zeros(4)),
        ("key", torch.zeros(8, dtype=torch.int64)),
        ("block", -1),
        ("block", 2**63),
        ("tensor", torch.zeros(3, dtype=torch.int64)),
        ("tensor", torch.zeros(3, dtype=torch.complex64)),
    ],
)
def test_bad_noise_arguments(name: str, value: object) -> None:
    arguments = {"tensor": torch.zeros(3), **GOOD, name: value}
    with pytest.raises(ValueError, match=name):
        gaussian_noise_(**arguments)


@pytest.mark.parametrize(
    "words",
    [
        torch.zeros((2, 15), dtype=torch.int32),
        torch.zeros((2, 16)),
        torch.zeros((16, 2), dtype=torch.int32).t(),
    ],
)
def test_bad_words(words: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="words"):
        chacha20_blocks_(words, GOOD["key"], 0)


def test_blocks_of_several_tensors_follow_each_other() -> None:
    source = NoiseSource()
    first_key, first = source.take(20)
    key, blocks = source.take_each([9, 0, 8, 1])
    assert torch.equal(key, first_key)
    assert blocks == [first + 3, first + 5, first + 5, first + 6]
    assert source.take(1)[1] == first + 7
    assert source.take_each([])[1] == []


def test_bad_take_and_dtype() -> None:
    with pytest.raises(ValueError, match="numel=-1"):
        NoiseSource().take(-1)
    with pytest.raises(ValueError, match="dtype"):
        standard_normals(torch.zeros((1, 16), dtype=torch.int32), torch.float16)


@pytest.mark.parametrize(
    "op", [gaussian_noise_, chacha20_blocks_, standard_normals, discrete_gaussians]
)
def test_torch_library_registration(op, key: torch.Tensor) -> None:
    words = torch.zeros((16, 3), dtype=torch.int32).T
    arguments = {
        "gaussian_noise_": (torch.zeros(20)[::2], 1.0, key, 0),
        "chacha20_blocks_": (words.contiguous(), key, 0, 0),
        "standard_normals": (words, torch.float64),
        "discrete_gaussians": (words,),
    }[op.name]
    torch.library.opcheck(op._library_op, arguments)
