// Sigmoid and hyperbolic tangent of vectors of floats, to about two units of rounding.
//
// Both come from e^y - 1 = 2^k (e^r - 1) + (2^k - 1), y = k ln 2 + r with |r| <= ln(2) / 2, which
// keeps its relative precision near 0. NaN stays NaN. The polynomial is a Chebyshev fit made for
// this file (relative error of e^r - 1 before rounding: 1.5e-9).
#pragma once

#include "cpu/simd.h"

namespace dpkernels::cpu {

struct Exponential {
    Floats power;  // 2^k
    Floats rest;   // e^r - 1
};

// For |y| <= 87; what lies outside must be clamped before.
DPK_INLINE Exponential exponential(Floats y) {
    constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
    const Floats shifted = y * 1.44269504f + kRound;
    const Floats k = shifted - kRound;
    const Floats r = (y - k * 0x1.62ep-1f) - k * 0x1.0bfbe8p-15f;
    Floats p = r * 0.000198995869f + 0.00139338837f;
    p = p * r + 0.00833329838f;
    p = p * r + 0.041666463f;
    p = p * r + 0.166666672f;
    p = p * r + 0.5f;
    const Words exponent = bits_as<Words>(shifted) + (127u - 0x4b400000u);
    return {bits_as<Floats>(exponent << 23), p * (r * r) + r};
}

DPK_INLINE Floats sigmoid(Floats x) {
    const Floats low = x < -87.0f ? Floats{} - 87.0f : x;
    const Floats clamped = low > 87.0f ? Floats{} + 87.0f : low;
    const Exponential e = exponential(-clamped);
    return 1.0f / (1.0f + (e.power + e.power * e.rest));
}

DPK_INLINE Floats hyperbolic_tangent(Floats x) {
    const Words sign = bits_as<Words>(x) & 0x80000000u;
    const Floats twice = bits_as<Floats>(bits_as<Words>(x) | 0x80000000u) * 2.0f;  // -2 |x|
    const Floats clamped = twice < -40.0f ? Floats{} - 40.0f : twice;
    const Exponential e = exponential(clamped);
    const Floats below = e.power * e.rest + (e.power - 1.0f);  // e^(-2 |x|) - 1
    const Words size = bits_as<Words>(below / (2.0f + below)) & 0x7fffffffu;
    return bits_as<Floats>(size | sign);
}

}  // namespace dpkernels::cpu
