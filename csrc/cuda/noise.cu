#include "common/chacha20.h"
#include "cuda/launch.cuh"
#include "cuda/normals.cuh"
#include "dpkernels/clip.h"
#include "dpkernels/noise.h"

namespace dpkernels::cuda {

namespace {

__global__ void chacha20_kernel(std::uint32_t* words,  // [blocks, 16]
                                std::int64_t blocks, Key key, std::uint64_t counter,
                                std::uint64_t nonce) {
    const std::int64_t index = thread_index();
    if (index >= blocks) return;
    const std::uint64_t own = counter + static_cast<std::uint64_t>(index);
    std::uint32_t x[16];
    chacha20_block(x, key, static_cast<std::uint32_t>(own), static_cast<std::uint32_t>(own >> 32),
                   nonce);
#pragma unroll
    for (int i = 0; i < 16; ++i) words[16 * index + i] = x[i];
}

template <class T>
__global__ void normals_kernel(T* z,                        // [blocks, 8]
                               const std::uint32_t* words,  // [blocks, 16]
                               std::int64_t blocks) {
    const std::int64_t index = thread_index();
    if (index >= blocks) return;
    std::uint32_t x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = words[16 * index + i];
    T normals[kPerBlock];
    normals_of(x, normals);
#pragma unroll
    for (int i = 0; i < kPerBlock; ++i) z[kPerBlock * index + i] = normals[i];
}

}  // namespace

void standard_normals(void* z, DType type, const std::uint32_t* words, std::int64_t blocks,
                      Launch launch) {
    if (type == DType::float64) {
        launch_over(blocks, launch, normals_kernel<double>, static_cast<double*>(z), words, blocks);
    } else {
        launch_over(blocks, launch, normals_kernel<float>, static_cast<float*>(z), words, blocks);
    }
}

void chacha20_blocks(std::uint32_t* words, std::int64_t blocks, Key key, std::uint64_t counter,
                     std::uint64_t nonce, Launch launch) {
    launch_over(blocks, launch, chacha20_kernel, words, blocks, key, counter, nonce);
}

// The end of a DP step without samples is exactly this.
void gaussian_noise(void* tensor, DType type, std::int64_t numel, double noise_std, Key key,
                    std::uint64_t block, Launch launch) {
    const Finish finish = {tensor, type, nullptr, type, nullptr, 0, numel, block, true};
    finish_grads({finish}, noise_std, 1.0, key, launch);
}

}  // namespace dpkernels::cuda
