// The inner kernel of the convolution weight gradient: a tile of dot products held in registers.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace dpkernels::cpu {

// Output channels and weight columns ((input channel, tap) pairs) of a tile: all sums, one gradient
// per row and one input fit the registers.
constexpr int kTileRows = kLanes == 16 ? 4 : 2;
constexpr int kTileColumns = 6;

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

// Lanes 0, 2, 4, ... of two vectors in a row.
DPK_INLINE Floats even_lanes(const Floats& low, const Floats& high) {
    Words index = 2 * lane_index();
    return __builtin_shuffle(low, high, index);
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
    const Quad ab =
        __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Quad cd =
        __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) +
           __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// Writes the first `columns` sums of each of `Rows` rows to result[row * row_size + column], or
// adds them to what is there.
template <int Rows>
void multiply_tile(const Tile& tile, int columns, bool accumulate, float* result,
                   std::int64_t row_size) {
    Floats total[Rows][kTileColumns] = {};
    for (std::int64_t plane = 0; plane < tile.planes; ++plane) {
        const std::int64_t grad_offset = plane * tile.grad_plane;
        const std::int64_t input_offset = plane * tile.input_plane;
        for (std::int64_t at = 0; at < tile.length; at += kLanes) {
            Floats grads[Rows];
#pragma GCC unroll 4
            for (int row = 0; row < Rows; ++row)
                grads[row] = load(tile.grads[row] + grad_offset + at);
#pragma GCC unroll 6
            for (int column = 0; column < kTileColumns; ++column) {
                const Floats seen = load(tile.inputs[column] + input_offset + at);
#pragma GCC unroll 4
                for (int row = 0; row < Rows; ++row) total[row][column] += grads[row] * seen;
            }
        }
    }
    float sums[Rows][8];
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
        Quad folded[kTileColumns];
#pragma GCC unroll 6
        for (int column = 0; column < kTileColumns; ++column) {
            folded[column] = fold<kLanes>(total[row][column]);
        }
        const Quad first = sum_lanes(folded[0], folded[1], folded[2], folded[3]);
        const Quad second = sum_lanes(folded[4], folded[5], folded[4], folded[5]);
        std::memcpy(sums[row], &first, sizeof(first));
        std::memcpy(sums[row] + 4, &second, sizeof(second));
    }
    for (int row = 0; row < Rows; ++row, result += row_size) {
        for (int column = 0; column < columns; ++column) {
            result[column] = sums[row][column] + (accumulate ? result[column] : 0.0f);
        }
    }
}

}  // namespace dpkernels::cpu
