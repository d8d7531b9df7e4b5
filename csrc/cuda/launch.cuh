// The current device for the length of a launch, and errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dpkernels/types.h"

namespace dpkernels::cuda {

constexpr int kThreads = 256;

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

class OnDevice {
public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before_ = 0;
};

// How many blocks of kThreads hold one thread for each of `items`.
inline std::int64_t blocks_over(std::int64_t items) { return (items + kThreads - 1) / kThreads; }

// Runs kernel(arguments...) with `blocks` blocks of kThreads.
template <class... Parameters, class... Arguments>
void launch_blocks(std::int64_t blocks, const Launch& launch, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
    if (blocks == 0) return;
    const OnDevice guard(launch.device);
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0,
             static_cast<cudaStream_t>(launch.stream)>>>(arguments...);
    check(cudaGetLastError(), "kernel launch");
}

// Runs kernel(arguments...) with one thread for each of `items`.
template <class... Parameters, class... Arguments>
void launch_over(std::int64_t items, const Launch& launch, void (*kernel)(Parameters...),
                 const Arguments&... arguments) {
    launch_blocks(blocks_over(items), launch, kernel, arguments...);
}

__device__ inline std::int64_t thread_index() {
    return static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

}  // namespace dpkernels::cuda
