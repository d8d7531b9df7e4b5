// Box-Muller with a 64-bit radius: four words of a ChaCha20 block become two standard normals.
//
//     u = (r + 1/2) 2^-64,  v = (a + 1/2) 2^-64,  r = r_low + 2^32 r_high,  a likewise
//     z0 = sqrt(-2 ln u) cos(2 pi v),   z1 = sqrt(-2 ln u) sin(2 pi v),   |z| <= 9.5
//
// Everything is computed from the distance to the nearer end of (0, 1), so u is never rounded to 0
// or 1 and ln u keeps its relative precision at both ends. The polynomials are minimax fits made
// for this file (relative error before rounding: logarithm 6e-9, sine 3e-9, cosine 1e-10).
#pragma once

#include <cmath>

#include "common/platform.h"

namespace dpkernels {

// Float is float or a vector of floats; Word and Int are the unsigned and signed 32-bit integers
// that go with it.
template <class Int, class Float, class Word>
DPK_INLINE void gaussian_pair(Word r_low, Word r_high, Word a_low, Word a_high, Float& z0,
                              Float& z1) {
    const Word upper = 0u - (r_high >> 31);  // all ones where u > 1/2
    const Float distance = convert<Float>(bits_as<Int>(r_high ^ upper)) * 0x1p-32f +
                           (convert<Float>(r_low ^ upper) * 0x1p-64f + 0x1p-65f);
    const Float u = upper != 0u ? 1.0f - distance : distance;

    // u = 2^exponent (1 + f), 1 + f in [sqrt(1/2), sqrt(2)).
    const Int offset = bits_as<Int>(u) - 0x3f3504f3;
    const Int exponent = offset >> 23;
    const Float mantissa = bits_as<Float>(bits_as<Word>(u) - (bits_as<Word>(exponent) << 23));
    const Float f = exponent == 0 ? -distance : mantissa - 1.0f;
    Float p = f * -0.07859546f + 0.12881622f;
    p = p * f - 0.13128768f;
    p = p * f + 0.14181196f;
    p = p * f - 0.16624553f;
    p = p * f + 0.20002286f;
    p = p * f - 0.2500081f;
    p = p * f + 0.33333317f;
    const Float log1p_f = (p * f - 0.5f) * (f * f) + f;
    const Float log_u = convert<Float>(exponent) * 0.693147181f + log1p_f;
    const Float radius = square_root(log_u * -2.0f);

    // v = quadrant / 4 + turn, turn in [-1/8, 1/8).
    const Word quadrant = (a_high + 0x20000000u) >> 30;
    const Float turn = convert<Float>(bits_as<Int>(a_high - (quadrant << 30))) * 0x1p-32f +
                       (convert<Float>(bits_as<Int>(a_low >> 1)) * 0x1p-63f + 0x1p-65f);
    const Float t = turn * turn;
    Float sine = t * -75.40206772f + 81.59255354f;
    sine = sine * t - 41.34166263f;
    sine = (sine * t + 6.28318529f) * turn;
    Float cosine = t * 59.2459618f - 85.44374165f;
    cosine = cosine * t + 64.93932647f;
    cosine = (cosine * t - 19.73920869f) * t + 1.0f;

    const auto odd = (quadrant & 1u) != 0u;
    const Float x = odd ? sine : cosine;
    const Float y = odd ? cosine : sine;
    const Word x_sign = ((quadrant + 1u) & 2u) << 30;
    const Word y_sign = (quadrant & 2u) << 30;
    z0 = bits_as<Float>(bits_as<Word>(radius * x) ^ x_sign);
    z1 = bits_as<Float>(bits_as<Word>(radius * y) ^ y_sign);
}

// The same pair in double precision (scalar; float64 gradients are for checking, not for speed).
DPK_INLINE void gaussian_pair(std::uint32_t r_low, std::uint32_t r_high, std::uint32_t a_low,
                              std::uint32_t a_high, double& z0, double& z1) {
    const std::uint64_t r = (static_cast<std::uint64_t>(r_high) << 32) | r_low;
    const std::uint64_t a = (static_cast<std::uint64_t>(a_high) << 32) | a_low;
    const bool upper = (r >> 63) != 0;
    const double distance = static_cast<double>(upper ? ~r : r) * 0x1p-64 + 0x1p-65;
    const double radius = sqrt(-2.0 * (upper ? log1p(-distance) : log(distance)));

    const std::uint64_t quadrant = (a + 0x2000000000000000u) >> 62;
    const double turn =
        static_cast<double>(static_cast<std::int64_t>(a - (quadrant << 62))) * 0x1p-64 + 0x1p-65;
    const double angle = 6.283185307179586 * turn;
    const double cosine = cos(angle), sine = sin(angle);
    const double x = (quadrant & 1) != 0 ? sine : cosine;
    const double y = (quadrant & 1) != 0 ? cosine : sine;
    z0 = ((quadrant + 1) & 2) != 0 ? -radius * x : radius * x;
    z1 = (quadrant & 2) != 0 ? -radius * y : radius * y;
}

}  // namespace dpkernels
