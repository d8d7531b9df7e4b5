// What every native op shares: element types and where a kernel runs.
//
// The headers are compiled once per device with DPKERNELS_DEVICE set to cpu or cuda: one
// declaration serves both backends, which then live side by side in dpkernels::cpu and
// dpkernels::cuda.
#pragma once

#include <cstdint>

#ifndef DPKERNELS_DEVICE
#define DPKERNELS_DEVICE cpu
#endif

namespace dpkernels {

// Counts changes of the functions that Python calls; dpkernels/ops/native.py knows it too.
constexpr int kInterface = 4;

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// 256-bit ChaCha20 key: words 4 to 11 of the state.
struct Key {
    std::uint32_t words[8];
};

// Where and how wide a kernel runs. The CPU reads `threads` only; CUDA the other two.
struct Launch {
    int threads = 1;
    int device = 0;
    void* stream = nullptr;  // cudaStream_t
};

}  // namespace dpkernels
