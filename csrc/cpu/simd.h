// Vectors as wide as the instruction set that this file is compiled for (CMakeLists.txt compiles
// every CPU kernel once per instruction set; the loader picks the library that the machine can
// run).
#pragma once

#include <cstdint>

#include "common/platform.h"

namespace dpkernels {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Words = std::uint32_t __attribute__((vector_size(4 * kLanes)));
using Ints = std::int32_t __attribute__((vector_size(4 * kLanes)));
using Floats = float __attribute__((vector_size(4 * kLanes)));
using UnalignedFloats =
    float __attribute__((vector_size(4 * kLanes), aligned(alignof(float)), may_alias));

DPK_INLINE Words lane_index() {
    Words result;
    for (int i = 0; i < kLanes; ++i) result[i] = static_cast<std::uint32_t>(i);
    return result;
}

DPK_INLINE Floats load(const float* address) {
    return *reinterpret_cast<const UnalignedFloats*>(address);
}

DPK_INLINE void store(float* address, const Floats& value) {
    *reinterpret_cast<UnalignedFloats*>(address) = value;
}

}  // namespace dpkernels
