// The inner kernel of the convolution weight gradient: a tile of dot products held in registers.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace dpkernels::cpu {

// Output channels and weight columns ((input channel, tap) pairs) of a tile: all sums, one gradient
// per row and one input fit the registers.
constexpr int kTileRows = kLanes == 8 ? 2 : 4;
constexpr int kTileColumns = kLanes == 4 ? 3 : 6;

// Operands of a tile: grads[r] . inputs[c], summed over `planes` runs of `length` floats.
struct Tile {
    const float* grads[kTileRows];  // first run of each output channel
    const float* inputs[kTileColumns];
    std::int64_t grad_plane;  // floats from one run to the next
    std::int64_t input_plane;
    std::int64_t planes;
    std::int64_t length;  // multiple of kLanes
};

using Quad = float __attribute__((vector_size(16)));
using UnalignedFloats =
    float __attribute__((vector_size(4 * kLanes), aligned(alignof(float)), may_alias));

DPK_INLINE Floats load(const float* address) {
    return *reinterpret_cast<const UnalignedFloats*>(address);
}

template <int Count>
struct Vector {
    typedef float type __attribute__((vector_size(4 * Count)));
};

// Adds the upper half of the lanes to the lower half until four are left.
template <int Count>
DPK_INLINE Quad fold(const typename Vector<Count>::type& value) {
    if constexpr (Count == 4) {
        return value;
    } else {
        typename Vector<Count / 2>::type halves[2];
        std::memcpy(halves, &value, sizeof(value));
        return fold<Count / 2>(halves[0] + halves[1]);
    }
}

// The four horizontal sums of four vectors.
DPK_INLINE Quad sum_lanes(Quad a, Quad b, Quad c, Quad d) {
    const Quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Quad cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// Adds the first `columns` sums of each of `Rows` rows to result[row * row_size + column].
template <int Rows>
void add_tile(const Tile& tile, int columns, float* result, std::int64_t row_size) {
    Floats total[Rows][kTileColumns] = {};
    for (std::int64_t plane = 0; plane < tile.planes; ++plane) {
        const std::int64_t grad_offset = plane * tile.grad_plane;
        const std::int64_t input_offset = plane * tile.input_plane;
        for (std::int64_t at = 0; at < tile.length; at += kLanes) {
            Floats grads[Rows];
#pragma GCC unroll 4
            for (int row = 0; row < Rows; ++row) grads[row] = load(tile.grads[row] + grad_offset + at);
#pragma GCC unroll 6
            for (int column = 0; column < kTileColumns; ++column) {
                const Floats seen = load(tile.inputs[column] + input_offset + at);
#pragma GCC unroll 4
                for (int row = 0; row < Rows; ++row) total[row][column] += grads[row] * seen;
            }
        }
    }
    Quad sums[kTileColumns];
#pragma GCC unroll 6
    for (int column = 0; column < kTileColumns; ++column) {
        Quad folded[4] = {};
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) folded[row] = fold<kLanes>(total[row][column]);
        sums[column] = sum_lanes(folded[0], folded[1], folded[2], folded[3]);
    }
    for (int column = 0; column < columns; ++column) {
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) result[row * row_size + column] += sums[column][row];
    }
}

}  // namespace dpkernels::cpu
