// Names that let the same inline code compile for the host and, under nvcc, for the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DPK_INLINE __host__ __device__ __forceinline__
#define DPK_UNROLL _Pragma("unroll")
#else
#define DPK_INLINE inline __attribute__((always_inline))
#define DPK_UNROLL
#endif

namespace dpkernels {

// Lane-wise conversion and reinterpretation, of scalars and of the vectors of cpu/simd.h.
template <class To, class From>
DPK_INLINE To convert(From value) {
#ifdef __CUDACC__
    return static_cast<To>(value);
#else
    if constexpr (sizeof(To) > sizeof(double)) {
        return __builtin_convertvector(value, To);
    } else {
        return static_cast<To>(value);
    }
#endif
}

template <class To, class From>
DPK_INLINE To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

template <class Float>
DPK_INLINE Float square_root(Float x) {
#ifndef __CUDACC__
    if constexpr (sizeof(Float) > sizeof(double)) {
        for (unsigned i = 0; i < sizeof(Float) / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
        return x;
    } else {
        return std::sqrt(x);
    }
#else
    return sqrtf(x);
#endif
}

}  // namespace dpkernels
