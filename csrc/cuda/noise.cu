#include "dpkernels/noise.h"

#include "common/chacha20.h"
#include "cuda/launch.cuh"
#include "dpkernels/clip.h"

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

}  // namespace

void chacha20_blocks(std::uint32_t* words, std::int64_t blocks, Key key, std::uint64_t counter,
                     std::uint64_t nonce, Launch launch) {
    launch_over(blocks, launch, chacha20_kernel, words, blocks, key, counter, nonce);
}

// The end of a DP step without samples is exactly this.
void gaussian_noise(void* tensor, DType type, std::int64_t numel, double noise_std, Key key,
                    std::uint64_t block, Launch launch) {
    finish_grad(tensor, type, nullptr, type, nullptr, 0, numel, noise_std, 1.0, key, block, true,
                launch);
}

}  // namespace dpkernels::cuda
