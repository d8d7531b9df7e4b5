#include <stdexcept>

#include "common/small_conv.h"
#include "cuda/launch.cuh"
#include "dpkernels/small_conv.h"

namespace dpkernels::cuda {

namespace {

using namespace small_conv;

// The lane of this thread, and its registers.
template <class Layout>
struct Lane : Layout {
    static constexpr int kLanes = 1;
    static __device__ int lane(int) { return threadIdx.x % kWarp; }
};

struct Machine16 : Lane<Layout16> {
    static __device__ std::uint16_t prepare(std::uint16_t x) { return x; }

    static __device__ void load_left(std::uint32_t (&fragment)[1][4], const std::uint16_t* shared,
                                     const int (&rows)[1][1]) {
        const auto address =
            static_cast<std::uint32_t>(__cvta_generic_to_shared(shared + rows[0][0]));
        std::uint32_t (&f)[4] = fragment[0];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
                     : "r"(address)
                     : "memory");
    }

    static __device__ void load_right(std::uint32_t (&fragment)[1][4], const std::uint16_t* shared,
                                      const int (&rows)[1][1]) {
        load_left(fragment, shared, rows);
    }
};

#define DPK_MMA(shape_and_types, sums, a, b0, b1)                            \
    asm("mma.sync.aligned." shape_and_types                                  \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"   \
        : "+f"((sums)[0]), "+f"((sums)[1]), "+f"((sums)[2]), "+f"((sums)[3]) \
        : "r"((a)[0]), "r"((a)[1]), "r"((a)[2]), "r"((a)[3]), "r"(b0), "r"(b1))

struct BFloat16Machine : Machine16 {
    template <int half>
    static __device__ void multiply(float (&sums)[1][4], const std::uint32_t (&a)[1][4],
                                    const std::uint32_t (&b)[1][4]) {
        DPK_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", sums[0], a[0], b[0][2 * half],
                b[0][2 * half + 1]);
    }
};

struct Float16Machine : Machine16 {
    template <int half>
    static __device__ void multiply(float (&sums)[1][4], const std::uint32_t (&a)[1][4],
                                    const std::uint32_t (&b)[1][4]) {
        DPK_MMA("m16n8k16.row.col.f32.f16.f16.f32", sums[0], a[0], b[0][2 * half],
                b[0][2 * half + 1]);
    }
};

struct TF32Machine : Lane<Layout32> {
    static __device__ float prepare(float x) {
        std::uint32_t rounded;
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
        return __uint_as_float(rounded);
    }

    static __device__ void load_left(std::uint32_t (&fragment)[1][4], const float* shared,
                                     const int (&rows)[1][2]) {
        Layout32::load_left(fragment[0], shared, rows[0]);
    }

    static __device__ void load_right(std::uint32_t (&fragment)[1][4], const float* shared,
                                      const int (&rows)[1][2]) {
        Layout32::load_right(fragment[0], shared, rows[0]);
    }

    template <int half>
    static __device__ void multiply(float (&sums)[1][4], const std::uint32_t (&a)[1][4],
                                    const std::uint32_t (&b)[1][4]) {
        DPK_MMA("m16n8k8.row.col.f32.tf32.tf32.f32", sums[0], a[0], b[0][2 * half],
                b[0][2 * half + 1]);
    }
};

// One block of threads for each slot of each sample.
template <class Machine, int rows, int columns>
__global__ void __launch_bounds__(kMostThreads, 1)
    small_conv_kernel(const typename Machine::T* input, const typename Machine::T* grad_output,
                      float* partials,  // [batch, slots, channels_out, channels_in, taps]
                      const __grid_constant__ Plan plan, int slots) {
    extern __shared__ __align__(16) unsigned char memory[];
    auto* shared = reinterpret_cast<typename Machine::T*>(memory);
    const auto sample = static_cast<std::int64_t>(blockIdx.x / slots);
    const int slot = static_cast<int>(blockIdx.x % slots);
    const int warp = threadIdx.x / kWarp;
    const int end = first_tile(plan, slot + 1, slots);
    input += sample * plan.input_stride[0];
    grad_output += sample * plan.grad_stride[0];
    Sums<Machine, rows, columns> sums = {};
    for (int tile = first_tile(plan, slot, slots); tile < end; ++tile) {
        __syncthreads();
        load_tile<Machine, rows, columns>(shared, input, grad_output, plan, tile, threadIdx.x,
                                          blockDim.x);
        __syncthreads();
        multiply(sums, shared, plan, warp);
    }
    const std::int64_t weights = plan.channels_out * plan.channels_in * plan.taps;
    store(partials + blockIdx.x * weights, sums, plan, warp);
}

// Adds the slots of each sample in order.
__global__ void combine_kernel(float* grad_sample,     // [batch, weights]
                               const float* partials,  // [batch, slots, weights]
                               std::int64_t batch, std::int64_t slots, std::int64_t weights) {
    const std::int64_t index = thread_index();
    if (index >= batch * weights) return;
    const float* partial = partials + index / weights * slots * weights + index % weights;
    float sum = 0.0f;
    for (std::int64_t slot = 0; slot < slots; ++slot) sum += partial[slot * weights];
    grad_sample[index] = sum;
}

template <class Machine, int rows, int columns>
void run(const void* input, const void* grad_output, float* partials, const ConvGeometry& geometry,
         std::int64_t slots, const Launch& launch) {
    using T = typename Machine::T;
    Plan plan;
    if (!make_plan<T, rows, columns>(plan, geometry, input, grad_output)) {
        throw std::invalid_argument("small_conv_grad_sample: no plan for this convolution");
    }
    const OnDevice guard(launch.device);
    const auto kernel = small_conv_kernel<Machine, rows, columns>;
    const auto bytes = static_cast<int>(sizeof(T)) * shared_elements<rows, columns>(plan);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "shared memory");
    const auto blocks = static_cast<unsigned>(geometry.batch * slots);
    kernel<<<blocks, warps_of(plan) * kWarp, bytes, static_cast<cudaStream_t>(launch.stream)>>>(
        static_cast<const T*>(input), static_cast<const T*>(grad_output), partials, plan,
        static_cast<int>(slots));
    check(cudaGetLastError(), "kernel launch");
}

using Run = void (*)(const void*, const void*, float*, const ConvGeometry&, std::int64_t,
                     const Launch&);

// By whether there are more than 16 output and input channels.
template <class Machine>
constexpr Run kRun[2][2] = {{run<Machine, 16, 16>, run<Machine, 16, 32>},
                            {run<Machine, 32, 16>, run<Machine, 32, 32>}};

}  // namespace

void small_conv_grad_sample(const void* input, const void* grad_output, DType type, float* partials,
                            float* grad_sample, const ConvGeometry& geometry, std::int64_t slots,
                            Launch launch) {
    const std::int64_t weights = geometry.channels_out * geometry.channels_in * geometry.kernel[0] *
                                 geometry.kernel[1] * geometry.kernel[2];
    const int high = geometry.channels_out > 16, wide = geometry.channels_in > 16;
    const Run run = type == DType::bfloat16  ? kRun<BFloat16Machine>[high][wide]
                    : type == DType::float16 ? kRun<Float16Machine>[high][wide]
                                             : kRun<TF32Machine>[high][wide];
    run(input, grad_output, slots > 1 ? partials : grad_sample, geometry, slots, launch);
    if (slots > 1) {
        launch_over(geometry.batch * weights, launch, combine_kernel, grad_sample, partials,
                    geometry.batch, slots, weights);
    }
}

}  // namespace dpkernels::cuda
