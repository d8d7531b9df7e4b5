// Loading and storing the four element types as float or double, in loops that vectorise.
#pragma once

#include <cstdint>

#include "common/platform.h"
#include "dpkernels/types.h"

namespace dpkernels::cpu {

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

DPK_INLINE float widen(float x) { return x; }
DPK_INLINE double widen(double x) { return x; }
DPK_INLINE float widen(BFloat16 x) {
    return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
// Shifting the bits into place leaves a float whose exponent is 112 too small.
DPK_INLINE float widen(Float16 x) {
    const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
    const float scaled = bits_as<float>(magnitude) * 0x1p112f;
    const std::uint32_t finite = bits_as<std::uint32_t>(scaled);
    const std::uint32_t result = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;
    return bits_as<float>(result | (static_cast<std::uint32_t>(x.bits & 0x8000u) << 16));
}

template <class T>
DPK_INLINE T narrow(double x) {
    return static_cast<T>(x);
}
template <class T>
DPK_INLINE T narrow(float x) {
    return static_cast<T>(x);
}
// Round to nearest, ties to even.
template <>
DPK_INLINE BFloat16 narrow<BFloat16>(float x) {
    const std::uint32_t bits = bits_as<std::uint32_t>(x);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<std::uint16_t>(x != x ? 0x7fc0u : rounded)};
}
// Adding 2^(exponent + 13) rounds to eleven bits; below 2^-14 the grid stays at 2^-24.
template <>
DPK_INLINE Float16 narrow<Float16>(float x) {
    const std::uint32_t bits = bits_as<std::uint32_t>(x);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const std::uint32_t odd = (magnitude >> 13) & 1u;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
    const std::uint32_t subnormal =
        bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
    std::uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result;
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return {static_cast<std::uint16_t>(sign | result)};
}

// Calls f with a null pointer of the element type, so that one template serves every DType.
template <class Function>
void with_type(DType type, Function&& f) {
    switch (type) {
        case DType::float32: return f(static_cast<float*>(nullptr));
        case DType::float64: return f(static_cast<double*>(nullptr));
        case DType::bfloat16: return f(static_cast<BFloat16*>(nullptr));
        case DType::float16: return f(static_cast<Float16*>(nullptr));
    }
}

}  // namespace dpkernels::cpu
