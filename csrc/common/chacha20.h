// The ChaCha20 block function (RFC 8439, section 2.3) on scalars or on vectors of lanes.
#pragma once

#include "common/platform.h"
#include "dpkernels/types.h"

namespace dpkernels {

template <int bits, class Word>
DPK_INLINE Word rotate_left(Word x) {
    return (x << bits) | (x >> (32 - bits));
}

template <class Word>
DPK_INLINE void quarter_round(Word& a, Word& b, Word& c, Word& d) {
    a += b;
    d = rotate_left<16>(d ^ a);
    c += d;
    b = rotate_left<12>(b ^ c);
    a += b;
    d = rotate_left<8>(d ^ a);
    c += d;
    b = rotate_left<7>(b ^ c);
}

// Twenty rounds in place, without the final addition of the input.
template <class Word>
DPK_INLINE void chacha20_rounds(Word (&x)[16]) {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int i = 0; i < 10; ++i) {
        quarter_round(x[0], x[4], x[8], x[12]);
        quarter_round(x[1], x[5], x[9], x[13]);
        quarter_round(x[2], x[6], x[10], x[14]);
        quarter_round(x[3], x[7], x[11], x[15]);
        quarter_round(x[0], x[5], x[10], x[15]);
        quarter_round(x[1], x[6], x[11], x[12]);
        quarter_round(x[2], x[7], x[8], x[13]);
        quarter_round(x[3], x[4], x[9], x[14]);
    }
}

// x = block function of (key, counter, nonce), each 64-bit number given as low and high words.
template <class Word>
DPK_INLINE void chacha20_block(Word (&x)[16], const Key& key, Word counter_low, Word counter_high,
                               std::uint64_t nonce) {
    const std::uint32_t constants[4] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u};
    const std::uint32_t nonce_low = static_cast<std::uint32_t>(nonce);
    const std::uint32_t nonce_high = static_cast<std::uint32_t>(nonce >> 32);
    const Word zero = counter_low ^ counter_low;
    for (int i = 0; i < 4; ++i) x[i] = zero + constants[i];
    for (int i = 0; i < 8; ++i) x[4 + i] = zero + key.words[i];
    x[12] = counter_low;
    x[13] = counter_high;
    x[14] = zero + nonce_low;
    x[15] = zero + nonce_high;
    chacha20_rounds(x);
    for (int i = 0; i < 4; ++i) x[i] += constants[i];
    for (int i = 0; i < 8; ++i) x[4 + i] += key.words[i];
    x[12] += counter_low;
    x[13] += counter_high;
    x[14] += nonce_low;
    x[15] += nonce_high;
}

}  // namespace dpkernels
