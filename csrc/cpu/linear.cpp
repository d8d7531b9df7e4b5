// Squared norms of weight gradients from two symmetric Gram matrices over a sample's positions.
//
// A sample's positions are packed into panels of kLanes: a panel holds, feature by feature, the
// values at its positions. A tile of dot products is then a sum of outer products, its columns
// loaded as vectors and its rows broadcast from the same panels. Only tiles that reach the diagonal
// or lie above it are formed; those of the activations and of the gradients are multiplied as soon
// as they are ready, so that no Gram matrix is ever in memory.
#include "dpkernels/linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/buffer.h"
#include "cpu/simd.h"

namespace dpkernels::cpu {

namespace {

using std::int64_t;

// Rows and panels of columns of a tile: all sums, the columns and one row fit the registers.
constexpr int kTileRows = kLanes == 16 ? 8 : 4;
constexpr int kTilePanels = 2;
static_assert(kLanes % kTileRows == 0, "the rows of a tile lie in one panel");

using HalfFloats = float __attribute__((vector_size(2 * kLanes)));
using Doubles = double __attribute__((vector_size(4 * kLanes)));  // of half as many lanes

// Swaps blocks of Size x Size off the diagonal, then those within them.
template <int Size>
DPK_INLINE void transpose(Floats (&rows)[kLanes]) {
    const Words lane = lane_index();
    const Words low = lane + (lane & Size) * (kLanes / Size - 1);
    const Words high = low + Size;
#pragma GCC unroll 16
    for (int row = 0; row < kLanes; ++row) {
        if (row & Size) continue;
        const Floats upper = rows[row], lower = rows[row + Size];
        rows[row] = __builtin_shuffle(upper, lower, low);
        rows[row + Size] = __builtin_shuffle(upper, lower, high);
    }
    if constexpr (Size > 1) transpose<Size / 2>(rows);
}

// One panel: `count` positions from `source` on, the rest zeros.
void pack_panel(float* panel, const float* source, const Rows& of, int64_t count) {
    int64_t k = 0;
    for (; k + kLanes <= of.features; k += kLanes) {
        Floats rows[kLanes];
#pragma GCC unroll 16
        for (int row = 0; row < kLanes; ++row) {
            rows[row] = row < count ? load(source + row * of.position_stride + k) : Floats{};
        }
        transpose<kLanes / 2>(rows);
#pragma GCC unroll 16
        for (int row = 0; row < kLanes; ++row) store(panel + (k + row) * kLanes, rows[row]);
    }
    for (; k < of.features; ++k) {
        for (int row = 0; row < kLanes; ++row) {
            panel[k * kLanes + row] = row < count ? source[row * of.position_stride + k] : 0.0f;
        }
    }
}

// A sample's panels, one after the other.
struct Panels {
    const float* values;
    int64_t features;

    int64_t size() const { return features * kLanes; }

    static Panels packed(float* target, const float* sample, const Rows& of, int64_t positions) {
        for (int64_t first = 0; first < positions; first += kLanes) {
            pack_panel(target + first * of.features, sample + first * of.position_stride, of,
                       std::min<int64_t>(kLanes, positions - first));
        }
        return {target, of.features};
    }
};

template <int Count>
struct Dots {
    Floats sums[kTileRows][Count] = {};

    // The rows from position `first` on by the columns of `Count` panels from `panel` on.
    DPK_INLINE Dots(const Panels& of, int64_t first, int64_t panel) {
        const float* left = of.values + first / kLanes * of.size() + first % kLanes;
        const float* right = of.values + panel * of.size();
        for (int64_t k = 0; k < of.size(); k += kLanes) {
            Floats columns[Count];
#pragma GCC unroll 2
            for (int c = 0; c < Count; ++c) columns[c] = load(right + c * of.size() + k);
#pragma GCC unroll 8
            for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 2
                for (int c = 0; c < Count; ++c) sums[row][c] += left[k + row] * columns[c];
            }
        }
    }
};

DPK_INLINE Doubles multiplied(const Floats& a, const Floats& g) {
    HalfFloats left[2], right[2];
    std::memcpy(left, &a, sizeof(a));
    std::memcpy(right, &g, sizeof(g));
    return convert<Doubles>(left[0]) * convert<Doubles>(right[0]) +
           convert<Doubles>(left[1]) * convert<Doubles>(right[1]);
}

// Adds the products of both Grams' tiles: what is below the diagonal counts for nothing, half of
// what is on it.
template <int Count>
void add_tile(Doubles& total, const Panels& a, const Panels& g, int64_t first, int64_t panel) {
    Dots<Count> a_dots(a, first, panel);
    Dots<Count> g_dots(g, first, panel);
    if (first / kLanes == panel) {
        for (int row = 0; row < kTileRows; ++row) {
            const Ints lane = convert<Ints>(lane_index());
            const int diagonal = static_cast<int>(first % kLanes) + row;
            Floats &a_row = a_dots.sums[row][0], &g_row = g_dots.sums[row][0];
            a_row = lane > diagonal ? a_row : (lane == diagonal ? 0.5f * a_row : Floats{});
            g_row = lane >= diagonal ? g_row : Floats{};
        }
    }
    for (int row = 0; row < kTileRows; ++row) {
        for (int c = 0; c < Count; ++c) {
            total += multiplied(a_dots.sums[row][c], g_dots.sums[row][c]);
        }
    }
}

float norm_sq_of(const Panels& a, const Panels& g, int64_t positions) {
    const int64_t panels = (positions + kLanes - 1) / kLanes;
    Doubles total = {};
    for (int64_t panel = 0; panel < panels; panel += kTilePanels) {
        const int64_t end = std::min(panels, panel + kTilePanels);
        const int64_t rows = std::min(positions, end * kLanes);
        for (int64_t first = 0; first < rows; first += kTileRows) {
            const int64_t reaching = std::max(panel, first / kLanes);
            if (end - reaching == kTilePanels) {
                add_tile<kTilePanels>(total, a, g, first, reaching);
            } else {
                add_tile<1>(total, a, g, first, reaching);
            }
        }
    }
    double sum = 0.0;
    for (int lane = 0; lane < kLanes / 2; ++lane) sum += total[lane];
    return static_cast<float>(sum < 0.0 ? 0.0 : 2.0 * sum);
}

}  // namespace

void gram_norm_sq(float* norm_sq, const Rows& activations, const Rows& grad_output, int64_t batch,
                  int64_t positions, Launch launch) {
    const int64_t padded = (positions + kLanes - 1) / kLanes * kLanes;
    const int team = static_cast<int>(std::min<int64_t>(launch.threads, batch));
#pragma omp parallel num_threads(team) if (team > 1)
    {
        AlignedBuffer buffer;
        float* a_target = buffer.at_least(padded * (activations.features + grad_output.features));
        float* g_target = a_target + padded * activations.features;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < batch; ++b) {
            const Panels a =
                Panels::packed(a_target, activations.values + b * activations.sample_stride,
                               activations, positions);
            const Panels g =
                Panels::packed(g_target, grad_output.values + b * grad_output.sample_stride,
                               grad_output, positions);
            norm_sq[b] = norm_sq_of(a, g, positions);
        }
    }
}

}  // namespace dpkernels::cpu
