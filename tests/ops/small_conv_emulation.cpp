// The small-channel convolution kernel on the host: the code of csrc/common/small_conv.h with the
// matrix instructions of a warp as loops, written from NVIDIA's description of them (PTX ISA,
// "Matrix fragments" of mma.m16n8k8 and m16n8k16, "ldmatrix"). Built and called by
// tests/ops/test_small_conv.py.
#include <cmath>
#include <limits>
#include <vector>

#include "common/small_conv.h"
#include "cpu/elements.h"

using namespace dpkernels;
using namespace dpkernels::small_conv;
using cpu::widen;

namespace {

// All 32 lanes of a warp, one after the other.
template <class Layout>
struct Warp : Layout {
    static constexpr int kLanes = kWarp;
    static int lane(int i) { return i; }
};

// sums += a b from the fragments of all lanes; element(word, part) reads one operand.
template <int half, int depth, class Element>
void multiply_fragments(float (&sums)[kWarp][4], const std::uint32_t (&a)[kWarp][4],
                        const std::uint32_t (&b)[kWarp][4], Element element) {
    constexpr int parts = depth / 8;  // elements in a register: 2 of 16 bits or 1 of 32
    double left[16][depth], right[depth][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        const int group = lane / 4, member = lane % 4;
        for (int word = 0; word < 4; ++word) {
            for (int part = 0; part < parts; ++part) {
                const int k = word / 2 * (depth / 2) + member * parts + part;
                left[group + word % 2 * 8][k] = element(a[lane][word], part);
            }
        }
        for (int word = 0; word < 2; ++word) {
            for (int part = 0; part < parts; ++part) {
                const int k = word * (depth / 2) + member * parts + part;
                right[k][group] = element(b[lane][2 * half + word], part);
            }
        }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        for (int e = 0; e < 4; ++e) {
            const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
            double sum = sums[lane][e];
            for (int k = 0; k < depth; ++k) sum += left[row][k] * right[k][column];
            sums[lane][e] = static_cast<float>(sum);
        }
    }
}

template <class Half>
struct HalfWarp : Warp<Layout16> {
    static std::uint16_t prepare(std::uint16_t x) { return x; }

    // ldmatrix.x4.trans: lanes 8i to 8i + 7 name the rows of matrix i.
    static void load_left(std::uint32_t (&fragment)[kWarp][4], const std::uint16_t* shared,
                          const int (&rows)[kWarp][1]) {
        for (int lane = 0; lane < kWarp; ++lane) {
            for (int matrix = 0; matrix < 4; ++matrix) {
                const int first = lane % 4 * 2, column = lane / 4;
                const std::uint32_t low = shared[rows[8 * matrix + first][0] + column];
                const std::uint32_t high = shared[rows[8 * matrix + first + 1][0] + column];
                fragment[lane][matrix] = low | (high << 16);
            }
        }
    }

    static void load_right(std::uint32_t (&fragment)[kWarp][4], const std::uint16_t* shared,
                           const int (&rows)[kWarp][1]) {
        load_left(fragment, shared, rows);
    }

    template <int half>
    static void multiply(float (&sums)[kWarp][4], const std::uint32_t (&a)[kWarp][4],
                         const std::uint32_t (&b)[kWarp][4]) {
        multiply_fragments<half, 16>(sums, a, b, [](std::uint32_t word, int part) {
            return widen(Half{static_cast<std::uint16_t>(word >> (16 * part))});
        });
    }
};

struct TF32Warp : Warp<Layout32> {
    // Round to nearest, ties away from zero, to ten bits of mantissa.
    static float prepare(float x) {
        const auto bits = bits_as<std::uint32_t>(x);
        return std::isfinite(x) ? bits_as<float>((bits + 0x1000u) & ~0x1fffu) : x;
    }

    static void load_left(std::uint32_t (&fragment)[kWarp][4], const float* shared,
                          const int (&rows)[kWarp][2]) {
        for (int i = 0; i < kWarp; ++i) Layout32::load_left(fragment[i], shared, rows[i]);
    }

    static void load_right(std::uint32_t (&fragment)[kWarp][4], const float* shared,
                           const int (&rows)[kWarp][2]) {
        for (int i = 0; i < kWarp; ++i) Layout32::load_right(fragment[i], shared, rows[i]);
    }

    template <int half>
    static void multiply(float (&sums)[kWarp][4], const std::uint32_t (&a)[kWarp][4],
                         const std::uint32_t (&b)[kWarp][4]) {
        multiply_fragments<half, 8>(sums, a, b,
                                    [](std::uint32_t word, int) { return bits_as<float>(word); });
    }
};

// As csrc/cuda/small_conv.cu launches it: blocks, and between barriers the threads in any order.
template <class Machine, int rows, int columns>
int emulate(const void* input, const void* grad_output, float* partials,
            const ConvGeometry& geometry, int slots) {
    using T = typename Machine::T;
    Plan plan;
    if (!make_plan<T, rows, columns>(plan, geometry, input, grad_output)) return 1;
    const int warps = warps_of(plan), threads = warps * kWarp;
    const int weights = plan.channels_out * plan.channels_in * plan.taps;
    std::vector<Eight<T>> memory(shared_elements<rows, columns>(plan) / 8 + 1);
    for (int block = 0; block < geometry.batch * slots; ++block) {
        const int sample = block / slots, slot = block % slots;
        auto* shared = reinterpret_cast<T*>(memory.data());
        for (std::size_t i = 0; i < memory.size() * 8; ++i) shared[i] = static_cast<T>(0x7fff);
        std::vector<Sums<Machine, rows, columns>> sums(warps);
        const int end = first_tile(plan, slot + 1, slots);
        for (int tile = first_tile(plan, slot, slots); tile < end; ++tile) {
            for (int thread = threads - 1; thread >= 0; --thread) {
                load_tile<Machine, rows, columns>(
                    shared, static_cast<const T*>(input) + sample * plan.input_stride[0],
                    static_cast<const T*>(grad_output) + sample * plan.grad_stride[0], plan, tile,
                    thread, threads);
            }
            for (int warp = 0; warp < warps; ++warp) multiply(sums[warp], shared, plan, warp);
        }
        for (int warp = 0; warp < warps; ++warp) {
            store(partials + static_cast<std::int64_t>(block) * weights, sums[warp], plan, warp);
        }
    }
    return 0;
}

template <class Machine>
int emulate(const void* input, const void* grad_output, float* partials,
            const ConvGeometry& geometry, int slots) {
    const auto run =
        geometry.channels_out > 16
            ? (geometry.channels_in > 16 ? emulate<Machine, 32, 32> : emulate<Machine, 32, 16>)
            : (geometry.channels_in > 16 ? emulate<Machine, 16, 32> : emulate<Machine, 16, 16>);
    return run(input, grad_output, partials, geometry, slots);
}

}  // namespace

// partials: [batch, slots, channels_out, channels_in, taps]. Returns 0, or 1 if there is no plan.
extern "C" int small_conv(const void* input, const void* grad_output, int type, float* partials,
                          const std::int64_t* geometry, int slots) {
    static_assert(sizeof(ConvGeometry) == 32 * sizeof(std::int64_t));
    ConvGeometry read;
    std::memcpy(&read, geometry, sizeof(read));
    switch (static_cast<DType>(type)) {
        case DType::float32: return emulate<TF32Warp>(input, grad_output, partials, read, slots);
        case DType::bfloat16:
            return emulate<HalfWarp<cpu::BFloat16>>(input, grad_output, partials, read, slots);
        case DType::float16:
            return emulate<HalfWarp<cpu::Float16>>(input, grad_output, partials, read, slots);
        default: return 1;
    }
}
