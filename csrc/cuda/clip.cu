#include <type_traits>

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

// Tensors of one launch: the table travels as a kernel argument, of which there are 4 KB.
constexpr int kTensors = 40;

struct Table {
    std::int64_t first[kTensors + 1];  // thread block of each tensor's first element, then the end
    Finish tensors[kTensors];
    bool aligned[kTensors];  // whether 16-byte accesses are allowed
    int count;
};

// The last tensor that starts at or before this thread block, which so is not empty.
__device__ int tensor_of_block(const Table& table) {
    int low = 0, high = table.count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table.first[middle] <= blockIdx.x) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// One thread makes eight elements: the noise of one ChaCha20 block.
template <class Wide>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Table table, Wide noise_std, Wide scale, Key key) {
    const int which = tensor_of_block(table);
    const Finish& tensor = table.tensors[which];
    const bool aligned = table.aligned[which];
    const std::int64_t index = (blockIdx.x - table.first[which]) * kThreads + threadIdx.x;
    const std::int64_t first = index * kPerBlock;
    if (first >= tensor.numel) return;
    const std::int64_t left = tensor.numel - first;
    const int count = static_cast<int>(left < kPerBlock ? left : kPerBlock);

    Wide sum[kPerBlock] = {};
    if (tensor.accumulate) load(sum, tensor.out, tensor.out_type, first, count, aligned);
    for (std::int64_t b = 0; b < tensor.batch; ++b) {
        const Wide factor = static_cast<const Wide*>(tensor.clip_factor)[b];
        if (factor == Wide(0)) continue;
        Wide sample[kPerBlock];
        load(sample, tensor.grad_sample, tensor.sample_type, b * tensor.numel + first, count,
             aligned);
#pragma unroll
        for (int i = 0; i < kPerBlock; ++i) sum[i] += factor * sample[i];
    }
    if (noise_std != Wide(0)) {
        add_normals(sum, noise_std, key, tensor.block + static_cast<std::uint64_t>(index));
    }
#pragma unroll
    for (int i = 0; i < kPerBlock; ++i) sum[i] *= scale;
    store(tensor.out, tensor.out_type, first, sum, count, aligned);
}

bool aligned_to_16(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

// The tensors whose accumulation type is Wide, as many as a table holds in each launch.
template <class Wide>
void finish(const std::vector<Finish>& tensors, double noise_std, double scale, const Key& key,
            const Launch& launch) {
    Table table = {};
    const auto flush = [&] {
        launch_blocks(table.first[table.count], launch, finish_kernel<Wide>, table,
                      static_cast<Wide>(noise_std), static_cast<Wide>(scale), key);
        table.count = 0;
    };
    for (const Finish& tensor : tensors) {
        const bool wide = tensor.out_type == DType::float64;
        if (wide != std::is_same_v<Wide, double> || tensor.numel == 0) continue;
        const int at = table.count++;
        table.tensors[at] = tensor;
        table.aligned[at] = tensor.numel % kPerBlock == 0 && aligned_to_16(tensor.out) &&
                            aligned_to_16(tensor.grad_sample);
        table.first[at + 1] =
            table.first[at] + blocks_over((tensor.numel + kPerBlock - 1) / kPerBlock);
        if (table.count == kTensors) flush();
    }
    if (table.count > 0) flush();
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

void finish_grads(const std::vector<Finish>& tensors, double noise_std, double scale, Key key,
                  Launch launch) {
    finish<float>(tensors, noise_std, scale, key, launch);
    finish<double>(tensors, noise_std, scale, key, launch);
}

}  // namespace dpkernels::cuda
