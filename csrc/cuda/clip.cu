#include "common/chacha20.h"
#include "common/clip_factor.h"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/normals.cuh"
#include "dpkernels/clip.h"

namespace dpkernels::cuda {

namespace {

template <class T>
__global__ void factor_kernel(T* factor,         // [batch]
                              const T* norm_sq,  // [batch]
                              std::int64_t batch, double max_grad_norm, double gamma) {
    const std::int64_t b = thread_index();
    if (b < batch) factor[b] = clip_factor_of(norm_sq[b], max_grad_norm, gamma);
}

// sum += noise_std * z of one ChaCha20 block.
template <class Wide>
__device__ void add_normals(Wide (&sum)[kPerBlock], Wide noise_std, const Key& key,
                            std::uint64_t counter) {
    std::uint32_t x[16];
    chacha20_block(x, key, static_cast<std::uint32_t>(counter),
                   static_cast<std::uint32_t>(counter >> 32), 0);
    Wide z[kPerBlock];
    normals_of(x, z);
#pragma unroll
    for (int i = 0; i < kPerBlock; ++i) sum[i] += noise_std * z[i];
}

// One thread makes eight elements: the noise of one ChaCha20 block.
template <class Wide>
__global__ void finish_kernel(void* out,  // [numel]
                              DType out_type,
                              const void* grad_sample,  // [batch, numel]
                              DType sample_type,
                              const Wide* clip_factor,  // [batch]
                              std::int64_t batch, std::int64_t numel, Wide noise_std, Wide scale,
                              Key key, std::uint64_t block, bool accumulate, bool aligned) {
    const std::int64_t index = thread_index();
    const std::int64_t first = index * kPerBlock;
    if (first >= numel) return;
    const int count = static_cast<int>(numel - first < kPerBlock ? numel - first : kPerBlock);

    Wide sum[kPerBlock] = {};
    if (accumulate) load(sum, out, out_type, first, count, aligned);
    for (std::int64_t b = 0; b < batch; ++b) {
        const Wide factor = clip_factor[b];
        if (factor == Wide(0)) continue;
        Wide sample[kPerBlock];
        load(sample, grad_sample, sample_type, b * numel + first, count, aligned);
#pragma unroll
        for (int i = 0; i < kPerBlock; ++i) sum[i] += factor * sample[i];
    }
    if (noise_std != Wide(0)) {
        add_normals(sum, noise_std, key, block + static_cast<std::uint64_t>(index));
    }
#pragma unroll
    for (int i = 0; i < kPerBlock; ++i) sum[i] *= scale;
    store(out, out_type, first, sum, count, aligned);
}

bool aligned_to_16(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

template <class Wide>
void finish(void* out, DType out_type, const void* grad_sample, DType sample_type,
            const void* clip_factor, std::int64_t batch, std::int64_t numel, double noise_std,
            double scale, const Key& key, std::uint64_t block, bool accumulate,
            const Launch& launch) {
    const bool aligned = numel % kPerBlock == 0 && aligned_to_16(out) && aligned_to_16(grad_sample);
    launch_over((numel + kPerBlock - 1) / kPerBlock, launch, finish_kernel<Wide>, out, out_type,
                grad_sample, sample_type, static_cast<const Wide*>(clip_factor), batch, numel,
                static_cast<Wide>(noise_std), static_cast<Wide>(scale), key, block, accumulate,
                aligned);
}

}  // namespace

void clip_factor(void* factor, const void* norm_sq, DType type, std::int64_t batch,
                 double max_grad_norm, double gamma, Launch launch) {
    if (type == DType::float64) {
        launch_over(batch, launch, factor_kernel<double>, static_cast<double*>(factor),
                    static_cast<const double*>(norm_sq), batch, max_grad_norm, gamma);
    } else {
        launch_over(batch, launch, factor_kernel<float>, static_cast<float*>(factor),
                    static_cast<const float*>(norm_sq), batch, max_grad_norm, gamma);
    }
}

void finish_grad(void* out, DType out_type, const void* grad_sample, DType sample_type,
                 const void* clip_factor, std::int64_t batch, std::int64_t numel, double noise_std,
                 double scale, Key key, std::uint64_t block, bool accumulate, Launch launch) {
    const auto run = out_type == DType::float64 ? finish<double> : finish<float>;
    run(out, out_type, grad_sample, sample_type, clip_factor, batch, numel, noise_std, scale, key,
        block, accumulate, launch);
}

}  // namespace dpkernels::cuda
