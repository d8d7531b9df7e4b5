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

// Runs kernel(arguments...) with one thread for each of `items`.
template <class... Parameters, class... Arguments>
void launch_over(std::int64_t items, const Launch& launch, void (*kernel)(Parameters...),
                 Arguments... arguments) {
    if (items == 0) return;
    const OnDevice guard(launch.device);
    const auto blocks = static_cast<unsigned>((items + kThreads - 1) / kThreads);
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(arguments...);
    check(cudaGetLastError(), "kernel launch");
}

__device__ inline std::int64_t thread_index() {
    return static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

}  // namespace dpkernels::cuda
