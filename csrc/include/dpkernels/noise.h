// Gaussian noise from ChaCha20 (RFC 8439 block function, 64-bit block counter).
#pragma once

#include "dpkernels/types.h"

namespace dpkernels::DPKERNELS_DEVICE {

// words[i] = block function of (key, counter + i, nonce).
void chacha20_blocks(std::uint32_t* words,  // [blocks, 16]
                     std::int64_t blocks, Key key, std::uint64_t counter, std::uint64_t nonce,
                     Launch launch);

// The normals of given words, eight per block (common/gaussian.h).
void standard_normals(void* z,                     // [blocks, 8], of `type`
                      DType type,                  // float32 or float64
                      const std::uint32_t* words,  // [blocks, 16]
                      std::int64_t blocks, Launch launch);

// tensor += noise_std * z. Element i takes value i % 8 of block `block + i / 8`.
void gaussian_noise(void* tensor,  // [numel], contiguous, of `type`
                    DType type, std::int64_t numel, double noise_std, Key key, std::uint64_t block,
                    Launch launch);

}  // namespace dpkernels::DPKERNELS_DEVICE
