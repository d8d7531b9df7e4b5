// Eight normals of one ChaCha20 block, in single or double precision.
#pragma once

#include "common/gaussian.h"
#include "cuda/elements.cuh"

namespace dpkernels::cuda {

__device__ inline void normal_pair(const std::uint32_t* x, float& z0, float& z1) {
    gaussian_pair<std::int32_t>(x[0], x[1], x[2], x[3], z0, z1);
}

__device__ inline void normal_pair(const std::uint32_t* x, double& z0, double& z1) {
    gaussian_pair(x[0], x[1], x[2], x[3], z0, z1);
}

template <class Wide>
__device__ void normals_of(const std::uint32_t (&x)[16], Wide (&z)[kPerBlock]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) normal_pair(x + 4 * j, z[2 * j], z[2 * j + 1]);
}

}  // namespace dpkernels::cuda
