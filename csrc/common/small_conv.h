// Per-sample weight gradients of convolutions with few channels, on matrix units.
//
// One block of threads adds up a share of one sample's output positions for all weights. It walks
// over tiles of positions: the tile's gradients and every input that its windows touch (the halo)
// go to shared memory once, a row of channels per position, and each of up to 27 taps is then a
// product [channels_out, positions] x [positions, channels_in] that reads the same rows shifted. A
// warp owns three taps and all channels of them.
//
// Everything but the matrix instructions is plain code for host and device: a Machine supplies
// those, on the device by PTX and in tests/ops/small_conv_emulation.cpp by loops over the lanes of
// a warp (kLanes registers instead of one per thread).
#pragma once

#include <cstdint>

#include "common/platform.h"
#include "dpkernels/conv.h"

namespace dpkernels::small_conv {

constexpr int kMostTaps = 27;
constexpr int kTapsPerWarp = 3;
constexpr int kWarp = 32;
constexpr int kMostThreads = kMostTaps / kTapsPerWarp * kWarp;
constexpr int kMostShared = 96 * 1024;  // bytes
// A row of channels is followed by so many elements, which keeps eight rows on different banks.
constexpr int kGap = 8;

struct Plan {
    std::int64_t input_stride[5];
    std::int64_t grad_stride[5];
    int channels_in, channels_out;
    int kernel[3], stride[3], padding[3];
    int taps;
    int output[3];
    int reach[3];     // input positions up to the last that a window touches
    int tile[3];      // output positions of a tile, powers of two
    int tile_log[3];  // their logarithms
    int tiles[3];
    int halo[3];                     // input positions that the windows of a tile touch
    bool input_packed, grad_packed;  // whether eight channels can be read in one access
};

// Positions [first, first + size) on three axes, of which those within [0, limit) exist.
struct Box {
    int first[3], size[3], limit[3];
};

DPK_INLINE int volume(const int (&size)[3]) { return size[0] * size[1] * size[2]; }

// Elements of shared memory: the rows of the input, then those of the gradient.
template <int rows, int columns>
DPK_INLINE int input_elements(const Plan& plan) {
    return volume(plan.halo) * (columns + kGap);
}
template <int rows, int columns>
DPK_INLINE int shared_elements(const Plan& plan) {
    return input_elements<rows, columns>(plan) + volume(plan.tile) * (rows + kGap);
}

// The first tile of the table that is not larger than the output needs and fits into shared memory.
template <class T, int rows, int columns>
inline bool choose_tile(Plan& plan) {
    constexpr int kTiles[][3] = {{2, 2, 4}, {1, 2, 4}, {1, 1, 4}, {0, 4, 4}, {0, 3, 4}, {0, 2, 4},
                                 {0, 1, 4}, {0, 0, 7}, {0, 0, 6}, {0, 0, 5}, {0, 0, 4}};
    constexpr int kShortestRow = 4;  // a matrix instruction takes 16 positions
    for (const auto& tile_log : kTiles) {
        bool wanted = true;
        for (int axis = 0; axis < 3; ++axis) {
            const int least = axis == 2 ? kShortestRow : 0;
            plan.tile_log[axis] = tile_log[axis];
            plan.tile[axis] = 1 << tile_log[axis];
            plan.tiles[axis] = (plan.output[axis] + plan.tile[axis] - 1) / plan.tile[axis];
            plan.halo[axis] = (plan.tile[axis] - 1) * plan.stride[axis] + plan.kernel[axis];
            wanted &= tile_log[axis] <= least || plan.tile[axis] < 2 * plan.output[axis];
        }
        const std::size_t bytes = sizeof(T) * shared_elements<rows, columns>(plan);
        if (wanted && bytes <= kMostShared) return true;
    }
    return false;
}

// Whether rows of channels start at multiples of 16 bytes, whole eights of channels long.
inline bool is_packed(const void* data, const std::array<std::int64_t, 5>& stride,
                      std::int64_t channels) {
    bool packed = stride[1] == 1 && channels % 8 == 0;
    packed &= reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
    for (int axis = 0; axis < 5; ++axis) packed &= axis == 1 || stride[axis] % 8 == 0;
    return packed;
}

// Whether there is a plan: kernel sizes and strides are small, dilation and groups are one.
template <class T, int rows, int columns>
inline bool make_plan(Plan& plan, const ConvGeometry& geometry, const void* input,
                      const void* grad_output) {
    plan.channels_in = static_cast<int>(geometry.channels_in);
    plan.channels_out = static_cast<int>(geometry.channels_out);
    for (int axis = 0; axis < 3; ++axis) {
        if (geometry.dilation[axis] != 1) return false;
        plan.kernel[axis] = static_cast<int>(geometry.kernel[axis]);
        plan.stride[axis] = static_cast<int>(geometry.stride[axis]);
        plan.padding[axis] = static_cast<int>(geometry.padding[axis]);
        plan.output[axis] = static_cast<int>(geometry.output[axis]);
        const std::int64_t reach = (geometry.output[axis] - 1) * geometry.stride[axis] +
                                   geometry.kernel[axis] - geometry.padding[axis];
        plan.reach[axis] =
            static_cast<int>(reach < geometry.input[axis] ? reach : geometry.input[axis]);
    }
    plan.taps = volume(plan.kernel);
    for (int axis = 0; axis < 5; ++axis) {
        plan.input_stride[axis] = geometry.input_stride[axis];
        plan.grad_stride[axis] = geometry.grad_stride[axis];
    }
    plan.input_packed = is_packed(input, geometry.input_stride, geometry.channels_in);
    plan.grad_packed = is_packed(grad_output, geometry.grad_stride, geometry.channels_out);
    return geometry.groups == 1 && plan.channels_in <= columns && plan.channels_out <= rows &&
           plan.taps <= kMostTaps && choose_tile<T, rows, columns>(plan);
}

DPK_INLINE int warps_of(const Plan& plan) { return (plan.taps + kTapsPerWarp - 1) / kTapsPerWarp; }

// The first of the tiles that a slot adds up; the next slot's first is its end.
DPK_INLINE int first_tile(const Plan& plan, int slot, int slots) {
    return static_cast<int>(static_cast<std::int64_t>(volume(plan.tiles)) * slot / slots);
}

template <class T>
struct alignas(16) Eight {
    T values[8];
};

// shared[row][channel] = what the box has there, zeros where it has nothing.
template <class Machine, int channels_padded, class T>
DPK_INLINE void load_box(T* shared,        // [volume(box.size), channels_padded + kGap]
                         const T* sample,  // at position 0, channel 0
                         const Box& box, const std::int64_t (&stride)[5], int channels, bool packed,
                         int thread, int threads) {
    const int rows = volume(box.size);
    for (int row = thread; row < rows; row += threads) {
        const int d = box.first[0] + row / (box.size[1] * box.size[2]);
        const int h = box.first[1] + row / box.size[2] % box.size[1];
        const int w = box.first[2] + row % box.size[2];
        const bool exists =
            d >= 0 && d < box.limit[0] && h >= 0 && h < box.limit[1] && w >= 0 && w < box.limit[2];
        const T* source = exists ? sample + d * stride[2] + h * stride[3] + w * stride[4] : sample;
        auto* target = reinterpret_cast<Eight<T>*>(shared + row * (channels_padded + kGap));
        for (int first = 0; first < channels_padded; first += 8) {
            Eight<T> eight = {};
            if (exists && packed && first < channels) {
                eight = *reinterpret_cast<const Eight<T>*>(source + first);
            } else if (exists) {
                for (int i = 0; i < 8; ++i) {
                    if (first + i < channels) eight.values[i] = source[(first + i) * stride[1]];
                }
            }
            for (int i = 0; i < 8; ++i) eight.values[i] = Machine::prepare(eight.values[i]);
            target[first / 8] = eight;
        }
    }
}

// One thread's part in loading a tile of one sample.
template <class Machine, int rows, int columns, class T>
DPK_INLINE void load_tile(T* shared, const T* input, const T* grad_output, const Plan& plan,
                          int tile, int thread, int threads) {
    const int at[3] = {tile / (plan.tiles[1] * plan.tiles[2]), tile / plan.tiles[2] % plan.tiles[1],
                       tile % plan.tiles[2]};
    Box seen, grads;
    for (int axis = 0; axis < 3; ++axis) {
        const int first = at[axis] * plan.tile[axis];
        grads.first[axis] = first;
        grads.size[axis] = plan.tile[axis];
        grads.limit[axis] = plan.output[axis];
        seen.first[axis] = first * plan.stride[axis] - plan.padding[axis];
        seen.size[axis] = plan.halo[axis];
        seen.limit[axis] = plan.reach[axis];
    }
    load_box<Machine, columns>(shared, input, seen, plan.input_stride, plan.channels_in,
                               plan.input_packed, thread, threads);
    load_box<Machine, rows>(shared + input_elements<rows, columns>(plan), grad_output, grads,
                            plan.grad_stride, plan.channels_out, plan.grad_packed, thread, threads);
}

// The row of the halo where the window of the tile's output position starts.
DPK_INLINE int window_row(const Plan& plan, int position) {
    const int w = position & (plan.tile[2] - 1);
    const int h = (position >> plan.tile_log[2]) & (plan.tile[1] - 1);
    const int d = position >> (plan.tile_log[1] + plan.tile_log[2]);
    return (d * plan.stride[0] * plan.halo[1] + h * plan.stride[1]) * plan.halo[2] +
           w * plan.stride[2];
}

// How many rows of the halo further a tap of the window is.
DPK_INLINE int tap_row(const Plan& plan, int tap) {
    const int w = tap % plan.kernel[2];
    const int h = tap / plan.kernel[2] % plan.kernel[1];
    const int d = tap / (plan.kernel[1] * plan.kernel[2]);
    return (d * plan.halo[1] + h) * plan.halo[2] + w;
}

// 16-bit operands: 16 positions per instruction. A lane names one row of one of the four 8 x 8
// matrices that ldmatrix gathers, which the instruction transposes into fragments.
struct Layout16 {
    using T = std::uint16_t;
    static constexpr int kDepth = 16;
    static constexpr int kRows = 1;
    static DPK_INLINE int left_position(int lane, int) { return lane / 16 * 8 + lane % 8; }
    static DPK_INLINE int left_channel(int lane) { return lane / 8 % 2 * 8; }
    static DPK_INLINE int right_position(int lane, int) { return lane / 8 % 2 * 8 + lane % 8; }
    static DPK_INLINE int right_channel(int lane) { return lane / 16 * 8; }
};

// float32 operands as TF32: 8 positions per instruction. A lane reads its own elements, at two
// positions.
struct Layout32 {
    using T = float;
    static constexpr int kDepth = 8;
    static constexpr int kRows = 2;
    static DPK_INLINE int left_position(int lane, int j) { return lane % 4 + 4 * j; }
    static DPK_INLINE int left_channel(int lane) { return lane / 4; }
    static DPK_INLINE int right_position(int lane, int j) { return lane % 4 + 4 * j; }
    static DPK_INLINE int right_channel(int lane) { return lane / 4; }
    static DPK_INLINE void load_left(std::uint32_t (&fragment)[4], const float* shared,
                                     const int (&rows)[2]) {
        fragment[0] = bits_as<std::uint32_t>(shared[rows[0]]);
        fragment[1] = bits_as<std::uint32_t>(shared[rows[0] + 8]);
        fragment[2] = bits_as<std::uint32_t>(shared[rows[1]]);
        fragment[3] = bits_as<std::uint32_t>(shared[rows[1] + 8]);
    }
    static DPK_INLINE void load_right(std::uint32_t (&fragment)[4], const float* shared,
                                      const int (&rows)[2]) {
        fragment[0] = bits_as<std::uint32_t>(shared[rows[0]]);
        fragment[1] = bits_as<std::uint32_t>(shared[rows[1]]);
        fragment[2] = bits_as<std::uint32_t>(shared[rows[0] + 8]);
        fragment[3] = bits_as<std::uint32_t>(shared[rows[1] + 8]);
    }
};

// A lane's part of a warp's three [rows, columns] sums, in 16 x 8 tiles of four elements per lane.
template <class Machine, int rows, int columns>
struct Sums {
    float values[kTapsPerWarp][rows / 16][columns / 8][Machine::kLanes][4];
};

// sums[tap] += gradients x inputs of the tile's positions, for the taps of one warp.
template <class Machine, int rows, int columns>
DPK_INLINE void multiply(Sums<Machine, rows, columns>& sums, const typename Machine::T* shared,
                         const Plan& plan, int warp) {
    constexpr int kLanes = Machine::kLanes;
    const typename Machine::T* grads = shared + input_elements<rows, columns>(plan);
    int shift[kTapsPerWarp];
    for (int i = 0; i < kTapsPerWarp; ++i) {
        shift[i] = tap_row(plan, warp * kTapsPerWarp + i) * (columns + kGap);
    }
    const int positions = volume(plan.tile);
    for (int start = 0; start < positions; start += Machine::kDepth) {
        int left[kLanes][Machine::kRows], right[kLanes][Machine::kRows];
        for (int i = 0; i < kLanes; ++i) {
            const int lane = Machine::lane(i);
            for (int j = 0; j < Machine::kRows; ++j) {
                left[i][j] = (start + Machine::left_position(lane, j)) * (rows + kGap) +
                             Machine::left_channel(lane);
                const int row = window_row(plan, start + Machine::right_position(lane, j));
                right[i][j] = row * (columns + kGap) + Machine::right_channel(lane);
            }
        }
        std::uint32_t a[rows / 16][kLanes][4];
        DPK_UNROLL
        for (int m = 0; m < rows / 16; ++m) Machine::load_left(a[m], grads + 16 * m, left);
        DPK_UNROLL
        for (int i = 0; i < kTapsPerWarp; ++i) {
            if (warp * kTapsPerWarp + i >= plan.taps) break;
            DPK_UNROLL
            for (int n = 0; n < columns / 8; n += 2) {
                std::uint32_t b[kLanes][4];
                Machine::load_right(b, shared + shift[i] + 8 * n, right);
                DPK_UNROLL
                for (int m = 0; m < rows / 16; ++m) {
                    Machine::template multiply<0>(sums.values[i][m][n], a[m], b);
                    Machine::template multiply<1>(sums.values[i][m][n + 1], a[m], b);
                }
            }
        }
    }
}

// The weights of one warp's taps.
template <class Machine, int rows, int columns>
DPK_INLINE void store(float* weights,  // [channels_out, channels_in, taps]
                      const Sums<Machine, rows, columns>& sums, const Plan& plan, int warp) {
    DPK_UNROLL
    for (int i = 0; i < kTapsPerWarp; ++i) {
        const int tap = warp * kTapsPerWarp + i;
        DPK_UNROLL
        for (int m = 0; m < rows / 16; ++m) {
            DPK_UNROLL
            for (int n = 0; n < columns / 8; ++n) {
                for (int k = 0; k < Machine::kLanes; ++k) {
                    const int lane = Machine::lane(k);
                    DPK_UNROLL
                    for (int e = 0; e < 4; ++e) {
                        const int row = 16 * m + 8 * (e / 2) + lane / 4;
                        const int column = 8 * n + 2 * (lane % 4) + e % 2;
                        if (tap < plan.taps && row < plan.channels_out &&
                            column < plan.channels_in) {
                            weights[(row * plan.channels_in + column) * plan.taps + tap] =
                                sums.values[i][m][n][k][e];
                        }
                    }
                }
            }
        }
    }
}

}  // namespace dpkernels::small_conv
