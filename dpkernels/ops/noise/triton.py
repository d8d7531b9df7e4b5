"""ChaCha20 Gaussian noise in Triton: one block, sixteen words and eight normals, per lane.

The words are those of every other backend; the normals differ by float rounding. The transform is
the one of csrc/common/gaussian.h: everything from the distance to the nearer end of (0, 1), so the
64-bit radius keeps its relative precision in both tails. `tl.randn` is never used: its uniform is
clamped and its tail ends at 5.7 (docs/math.md section 3).

Key and counter travel as signed 32-bit arguments that are not specialised on, so no kernel is
compiled for a key and none is kept in Triton's cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dpkernels.ops import native
from dpkernels.ops import triton_support as support
from dpkernels.ops.noise.source import blocks_needed

unavailable = support.unavailable

LANES = 128
"""ChaCha20 blocks per program."""
SECRETS = [f"key{i}" for i in range(8)] + ["block_low", "block_high", "nonce_low", "nonce_high"]


@triton.jit
def _rotate(x, BITS: tl.constexpr):
    return (x << BITS) | (x >> (32 - BITS))


@triton.jit
def _quarter_round(a, b, c, d):
    a += b
    d = _rotate(d ^ a, 16)
    c += d
    b = _rotate(b ^ c, 12)
    a += b
    d = _rotate(d ^ a, 8)
    c += d
    b = _rotate(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _word(value, LANES: tl.constexpr):
    """A scalar's 32 bits in every lane, unsigned."""
    return tl.full([LANES], 0, tl.uint32) + value.to(tl.uint32, bitcast=True)


@triton.jit
def key_stream(
    first, block_low, block_high, nonce_low, nonce_high,
    key0, key1, key2, key3, key4, key5, key6, key7, LANES: tl.constexpr,
):  # fmt: skip
    """The sixteen words of blocks block + first, block + first + 1, ...: RFC 8439 section 2.3."""
    counter = _word(block_low, LANES).to(tl.uint64)
    counter += _word(block_high, LANES).to(tl.uint64) << 32
    counter += (first + tl.arange(0, LANES)).to(tl.uint64)
    s0 = tl.full([LANES], 0x61707865, tl.uint32)
    s1 = tl.full([LANES], 0x3320646E, tl.uint32)
    s2 = tl.full([LANES], 0x79622D32, tl.uint32)
    s3 = tl.full([LANES], 0x6B206574, tl.uint32)
    s4, s5, s6, s7 = _word(key0, LANES), _word(key1, LANES), _word(key2, LANES), _word(key3, LANES)
    s8, s9 = _word(key4, LANES), _word(key5, LANES)
    s10, s11 = _word(key6, LANES), _word(key7, LANES)
    s12, s13 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    s14, s15 = _word(nonce_low, LANES), _word(nonce_high, LANES)
    x0, x1, x2, x3, x4, x5, x6, x7 = s0, s1, s2, s3, s4, s5, s6, s7
    x8, x9, x10, x11, x12, x13, x14, x15 = s8, s9, s10, s11, s12, s13, s14, s15
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    return (
        x0 + s0, x1 + s1, x2 + s2, x3 + s3, x4 + s4, x5 + s5, x6 + s6, x7 + s7,
        x8 + s8, x9 + s9, x10 + s10, x11 + s11, x12 + s12, x13 + s13, x14 + s14, x15 + s15,
    )  # fmt: skip


@triton.jit
def gaussian_pair(r_low, r_high, a_low, a_high):
    """Two standard normals from four words, as csrc/common/gaussian.h."""
    upper = 0 - (r_high >> 31)
    distance = (r_high ^ upper).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-32
    distance += (r_low ^ upper).to(tl.float32) * 2.0**-64 + 2.0**-65
    u = tl.where(upper != 0, 1.0 - distance, distance)

    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    f = tl.where(exponent == 0, -distance, mantissa - 1.0)
    p = f * -0.07859546 + 0.12881622
    p = p * f - 0.13128768
    p = p * f + 0.14181196
    p = p * f - 0.16624553
    p = p * f + 0.20002286
    p = p * f - 0.2500081
    p = p * f + 0.33333317
    log1p_f = (p * f - 0.5) * (f * f) + f
    radius = tl.sqrt_rn((exponent.to(tl.float32) * 0.693147181 + log1p_f) * -2.0)

    quadrant = (a_high + 0x20000000) >> 30
    turn = (a_high - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-32
    turn += (a_low >> 1).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-63 + 2.0**-65
    t = turn * turn
    sine = t * -75.40206772 + 81.59255354
    sine = sine * t - 41.34166263
    sine = (sine * t + 6.28318529) * turn
    cosine = t * 59.2459618 - 85.44374165
    cosine = cosine * t + 64.93932647
    cosine = (cosine * t - 19.73920869) * t + 1.0

    odd = (quadrant & 1) != 0
    x = radius * tl.where(odd, sine, cosine)
    y = radius * tl.where(odd, cosine, sine)
    z0 = tl.where(((quadrant + 1) & 2) != 0, -x, x)
    z1 = tl.where((quadrant & 2) != 0, -y, y)
    return z0, z1


@triton.jit
def normals_of(
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15
):  # fmt: skip
    """Eight normals per block, block after block: [LANES] words -> [8 * LANES] float32."""
    z0, z1 = gaussian_pair(w0, w1, w2, w3)
    z2, z3 = gaussian_pair(w4, w5, w6, w7)
    z4, z5 = gaussian_pair(w8, w9, w10, w11)
    z6, z7 = gaussian_pair(w12, w13, w14, w15)
    even = tl.interleave(tl.interleave(z0, z4), tl.interleave(z2, z6))
    odd = tl.interleave(tl.interleave(z1, z5), tl.interleave(z3, z7))
    return tl.interleave(even, odd)


@triton.jit
def noise_of(
    first, block_low, block_high, nonce_low, nonce_high,
    key0, key1, key2, key3, key4, key5, key6, key7, LANES: tl.constexpr,
):  # fmt: skip
    """The normals of LANES blocks from block + first on: [8 * LANES] float32."""
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = key_stream(
        first, block_low, block_high, nonce_low, nonce_high,
        key0, key1, key2, key3, key4, key5, key6, key7, LANES,
    )  # fmt: skip
    return normals_of(w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15)


@triton.jit(do_not_specialize=SECRETS)
def noise_kernel(
    tensor, size, noise_std, block_low, block_high, nonce_low, nonce_high,
    key0, key1, key2, key3, key4, key5, key6, key7, LANES: tl.constexpr,
):  # fmt: skip
    """tensor += noise_std * z."""
    first = tl.program_id(0).to(tl.int64) * LANES
    z = noise_of(
        first, block_low, block_high, nonce_low, nonce_high,
        key0, key1, key2, key3, key4, key5, key6, key7, LANES,
    )  # fmt: skip
    at = first * 8 + tl.arange(0, 8 * LANES)
    held = tl.load(tensor + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(tensor + at, (held + noise_std * z).to(tensor.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=SECRETS)
def words_kernel(
    words, blocks, block_low, block_high, nonce_low, nonce_high,
    key0, key1, key2, key3, key4, key5, key6, key7, LANES: tl.constexpr,
):  # fmt: skip
    """words[i] = the key stream of block + i."""
    first = tl.program_id(0).to(tl.int64) * LANES
    stream = key_stream(
        first, block_low, block_high, nonce_low, nonce_high,
        key0, key1, key2, key3, key4, key5, key6, key7, LANES,
    )  # fmt: skip
    row = first + tl.arange(0, LANES)
    for word in tl.static_range(16):
        bits = stream[word].to(tl.int32, bitcast=True)
        tl.store(words + row * 16 + word, bits, mask=row < blocks)


@triton.jit
def _load_word(words, row, blocks, WORD: tl.constexpr):
    bits = tl.load(words + row * 16 + WORD, mask=row < blocks, other=0)
    return bits.to(tl.uint32, bitcast=True)


@triton.jit
def normals_kernel(words, out, blocks, LANES: tl.constexpr):
    """out[i] = the eight normals of words[i]."""
    first = tl.program_id(0).to(tl.int64) * LANES
    row = first + tl.arange(0, LANES)
    z = normals_of(
        _load_word(words, row, blocks, 0), _load_word(words, row, blocks, 1),
        _load_word(words, row, blocks, 2), _load_word(words, row, blocks, 3),
        _load_word(words, row, blocks, 4), _load_word(words, row, blocks, 5),
        _load_word(words, row, blocks, 6), _load_word(words, row, blocks, 7),
        _load_word(words, row, blocks, 8), _load_word(words, row, blocks, 9),
        _load_word(words, row, blocks, 10), _load_word(words, row, blocks, 11),
        _load_word(words, row, blocks, 12), _load_word(words, row, blocks, 13),
        _load_word(words, row, blocks, 14), _load_word(words, row, blocks, 15),
    )  # fmt: skip
    at = first * 8 + tl.arange(0, 8 * LANES)
    tl.store(out + at, z, mask=at // 8 < blocks)


def key_arguments(key: torch.Tensor, block: int, nonce: int = 0) -> tuple[int, ...]:
    """The twelve 32-bit arguments of a draw: counter, nonce, key."""
    draw = torch.tensor([block, nonce], dtype=torch.int64).view(torch.int32)
    return (*draw.tolist(), *key.view(torch.int32).tolist())


def why_not_gaussian_noise_(tensor: torch.Tensor, *rest: object) -> str | None:
    """Why this tensor is not for Triton."""
    return support.why_not(tensor)


def why_not_chacha20_blocks_(words: torch.Tensor, *rest: object) -> str | None:
    """Why this tensor is not for Triton."""
    return support.why_not_device(words)


def why_not_standard_normals(words: torch.Tensor, dtype: torch.dtype = torch.float32) -> str | None:
    """Why these words are not for Triton."""
    if dtype != torch.float32:
        return f"Triton kernels make float32 normals and {dtype} was asked for"
    return support.why_not_device(words)


def gaussian_noise_(tensor: torch.Tensor, noise_std: float, key: torch.Tensor, block: int) -> None:
    """See the contract. A tensor that is not contiguous is copied: noise follows its flat index."""
    blocks = blocks_needed(tensor.numel())
    if noise_std == 0 or blocks == 0:
        return
    flat = tensor.detach().contiguous()
    with torch.cuda.device_of(flat):
        noise_kernel[(triton.cdiv(blocks, LANES),)](
            flat, flat.numel(), float(noise_std), *key_arguments(key, block), LANES=LANES
        )
    native.write_back(tensor, flat)


def chacha20_blocks_(words: torch.Tensor, key: torch.Tensor, block: int, nonce: int = 0) -> None:
    """See the contract."""
    if len(words):
        with torch.cuda.device_of(words):
            words_kernel[(triton.cdiv(len(words), LANES),)](
                words, len(words), *key_arguments(key, block, nonce), LANES=LANES
            )
    native.write_back(words, words)


def standard_normals(words: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """See the contract."""
    out = torch.empty((len(words), 8), dtype=dtype, device=words.device)
    if len(words):
        with torch.cuda.device_of(words):
            normals_kernel[(triton.cdiv(len(words), LANES),)](
                words.detach().contiguous(), out, len(words), LANES=LANES
            )
    return out
