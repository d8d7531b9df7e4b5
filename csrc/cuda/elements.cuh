// Eight consecutive elements of any DType as eight floats or doubles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "dpkernels/types.h"

namespace dpkernels::cuda {

constexpr int kPerBlock = 8;  // normals in a ChaCha20 block, elements per thread

template <class T>
struct alignas(16) Eight {
    T values[kPerBlock];
};

template <class Wide, class T>
__device__ void load_as(Wide (&x)[kPerBlock], const T* source, int count, bool aligned) {
    if (aligned) {
        const auto eight = *reinterpret_cast<const Eight<T>*>(source);
#pragma unroll
        for (int i = 0; i < kPerBlock; ++i) x[i] = static_cast<Wide>(eight.values[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kPerBlock; ++i) {
            x[i] = i < count ? static_cast<Wide>(source[i]) : Wide(0);
        }
    }
}

template <class Wide, class T>
__device__ void store_as(T* target, const Wide (&x)[kPerBlock], int count, bool aligned) {
    if (aligned) {
        Eight<T> eight;
#pragma unroll
        for (int i = 0; i < kPerBlock; ++i) eight.values[i] = static_cast<T>(x[i]);
        *reinterpret_cast<Eight<T>*>(target) = eight;
    } else {
#pragma unroll
        for (int i = 0; i < kPerBlock; ++i) {
            if (i < count) target[i] = static_cast<T>(x[i]);
        }
    }
}

// x = array[offset : offset + count], zeros after; `aligned`: count is 8 and the address allows
// 16-byte accesses. The branch on the type is the same for all threads of a kernel.
template <class Wide>
__device__ void load(Wide (&x)[kPerBlock], const void* array, DType type, std::int64_t offset,
                     int count, bool aligned) {
    switch (type) {
        case DType::float32:
            return load_as(x, static_cast<const float*>(array) + offset, count, aligned);
        case DType::float64:
            return load_as(x, static_cast<const double*>(array) + offset, count, aligned);
        case DType::bfloat16:
            return load_as(x, static_cast<const __nv_bfloat16*>(array) + offset, count, aligned);
        case DType::float16:
            return load_as(x, static_cast<const __half*>(array) + offset, count, aligned);
    }
}

template <class Wide>
__device__ void store(void* array, DType type, std::int64_t offset, const Wide (&x)[kPerBlock],
                      int count, bool aligned) {
    switch (type) {
        case DType::float32:
            return store_as(static_cast<float*>(array) + offset, x, count, aligned);
        case DType::float64:
            return store_as(static_cast<double*>(array) + offset, x, count, aligned);
        case DType::bfloat16:
            return store_as(static_cast<__nv_bfloat16*>(array) + offset, x, count, aligned);
        case DType::float16:
            return store_as(static_cast<__half*>(array) + offset, x, count, aligned);
    }
}

}  // namespace dpkernels::cuda
