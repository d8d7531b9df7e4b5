#include "dpkernels/linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/simd.h"

namespace dpkernels::cpu {

namespace {

// Rows and columns of a tile of dot products: all of them fit the registers.
constexpr int kTile = kLanes == 16 ? 4 : 3;

DPK_INLINE Floats load(const float* address) {
    Floats value;
    std::memcpy(&value, address, sizeof(value));
    return value;
}

// One sample's rows from `first` on, the last one repeated where there are no more.
void tile_rows(const float* (&rows)[kTile], const float* sample, const Rows& of, std::int64_t first,
               std::int64_t positions) {
    for (int i = 0; i < kTile; ++i) {
        rows[i] = sample + std::min(first + i, positions - 1) * of.position_stride;
    }
}

// Adds every vector's two halves, and puts the sums of two vectors side by side: half as many.
template <int Count>
DPK_INLINE void fold(Floats (&sums)[Count]) {
    if constexpr (Count > 1) {
        Ints even, odd;
        for (int lane = 0; lane < kLanes; ++lane) {
            even[lane] = 2 * lane;
            odd[lane] = 2 * lane + 1;
        }
        Floats folded[Count / 2];
        for (int i = 0; i < Count / 2; ++i) {
            folded[i] = __builtin_shuffle(sums[2 * i], sums[2 * i + 1], even) +
                        __builtin_shuffle(sums[2 * i], sums[2 * i + 1], odd);
        }
        fold(folded);
        sums[0] = folded[0];
    }
}

// dots[i][j]: the sum of the lanes of sums[i][j]
DPK_INLINE void lane_sums(float (&dots)[kTile][kTile], Floats (&sums)[kTile][kTile]) {
    if constexpr (kTile * kTile == kLanes) {
        auto& all = reinterpret_cast<Floats(&)[kLanes]>(sums);
        fold(all);
        std::memcpy(dots, &all[0], sizeof(dots));
    } else {
        for (int i = 0; i < kTile; ++i) {
            for (int j = 0; j < kTile; ++j) {
                dots[i][j] = 0.0f;
                for (int lane = 0; lane < kLanes; ++lane) dots[i][j] += sums[i][j][lane];
            }
        }
    }
}

// dots[i][j] = <left_i, right_j>
void dot_tile(float (&dots)[kTile][kTile], const float* const (&left)[kTile],
              const float* const (&right)[kTile], std::int64_t features) {
    Floats sums[kTile][kTile] = {};
    std::int64_t k = 0;
    for (; k + kLanes <= features; k += kLanes) {
        Floats l[kTile];
        for (int i = 0; i < kTile; ++i) l[i] = load(left[i] + k);
        for (int j = 0; j < kTile; ++j) {
            const Floats r = load(right[j] + k);
            for (int i = 0; i < kTile; ++i) sums[i][j] += l[i] * r;
        }
    }
    lane_sums(dots, sums);
    for (std::int64_t rest = k; rest < features; ++rest) {
        for (int i = 0; i < kTile; ++i) {
            for (int j = 0; j < kTile; ++j) dots[i][j] += left[i][rest] * right[j][rest];
        }
    }
}

// Tiles on and above the diagonal; those above it count twice.
float norm_sq_of(const float* activations, const float* grad_output, const Rows& a, const Rows& g,
                 std::int64_t positions) {
    double total = 0.0;
    for (std::int64_t t = 0; t < positions; t += kTile) {
        const float *a_left[kTile], *g_left[kTile], *a_right[kTile], *g_right[kTile];
        tile_rows(a_left, activations, a, t, positions);
        tile_rows(g_left, grad_output, g, t, positions);
        for (std::int64_t s = t; s < positions; s += kTile) {
            tile_rows(a_right, activations, a, s, positions);
            tile_rows(g_right, grad_output, g, s, positions);
            float a_dots[kTile][kTile], g_dots[kTile][kTile];
            dot_tile(a_dots, a_left, a_right, a.features);
            dot_tile(g_dots, g_left, g_right, g.features);
            double sum = 0.0;
            for (int i = 0; i < kTile && t + i < positions; ++i) {
                for (int j = 0; j < kTile && s + j < positions; ++j) {
                    sum += static_cast<double>(a_dots[i][j]) * g_dots[i][j];
                }
            }
            total += s == t ? sum : 2.0 * sum;
        }
    }
    return static_cast<float>(total < 0.0 ? 0.0 : total);
}

}  // namespace

void gram_norm_sq(float* norm_sq, const Rows& activations, const Rows& grad_output,
                  std::int64_t batch, std::int64_t positions, Launch launch) {
    const int team = static_cast<int>(std::min<std::int64_t>(launch.threads, batch));
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (std::int64_t b = 0; b < batch; ++b) {
        norm_sq[b] = norm_sq_of(activations.values + b * activations.sample_stride,
                                grad_output.values + b * grad_output.sample_stride, activations,
                                grad_output, positions);
    }
}

}  // namespace dpkernels::cpu
