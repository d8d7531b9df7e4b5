#include "dpkernels/affine.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/blocks.h"
#include "cpu/elements.h"
#include "cpu/parallel.h"

namespace dpkernels::cpu {

namespace {

using std::int64_t;

// Channels last; channels first, a block is kBlock positions of one channel.
constexpr int64_t kBlockRows = 64;
constexpr int64_t kBlockColumns = 256;

struct Sums {
    double weight = 0;
    double bias = 0;
};

// Adds sum G * (x - mean) and sum G over one block; without an input the former is left alone.
template <bool HasInput, class Wide>
DPK_INLINE void add_block(const Wide* input,  // [count]
                          const Wide* grad,   // [count]
                          int64_t count, Wide mean, Sums& sums) {
    using Unaligned = typename Lanes<Wide>::Unaligned;
    constexpr int64_t lanes = Lanes<Wide>::count;
    typename Lanes<Wide>::Vector weight[4] = {}, bias[4] = {};
    const auto add_vector = [&](int64_t at, int part) {
        const auto g = *reinterpret_cast<const Unaligned*>(grad + at);
        bias[part] += g;
        if constexpr (HasInput) {
            weight[part] += g * (*reinterpret_cast<const Unaligned*>(input + at) - mean);
        }
    };
    int64_t i = 0;
    for (; i + 4 * lanes <= count; i += 4 * lanes) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) add_vector(i + part * lanes, part);
    }
    for (; i + lanes <= count; i += lanes) add_vector(i, 0);
    Wide weight_rest = 0, bias_rest = 0;
    for (; i < count; ++i) {
        bias_rest += grad[i];
        if constexpr (HasInput) weight_rest += grad[i] * (input[i] - mean);
    }
    sums.bias += sum_lanes<Wide>(bias) + static_cast<double>(bias_rest);
    if constexpr (HasInput) {
        sums.weight += sum_lanes<Wide>(weight) + static_cast<double>(weight_rest);
    }
}

int team(const AffineShape& shape, Launch launch) {
    return team_for(shape.batch * shape.channels * shape.positions, launch);
}

// Blocks are centred on their own means and merged in double (Chan, Golub and LeVeque 1983).
template <class Wide, class T>
void moments(const T* input, Wide* mean, Wide* rstd, int64_t rows, int64_t count, double eps,
             Launch launch) {
#pragma omp parallel for num_threads(team_for(rows* count, launch)) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        Wide buffer[kBlock];
        double centre = 0, deviation = 0;
        for (int64_t begin = 0; begin < count; begin += kBlock) {
            const int64_t size = std::min(kBlock, count - begin);
            const Wide* block = widened(input + row * count + begin, size, buffer);
            Sums sums;
            add_block<false>(static_cast<const Wide*>(nullptr), block, size, Wide(0), sums);
            const auto block_mean = static_cast<Wide>(sums.bias / static_cast<double>(size));
            // The block's sum of squares about its true mean, from that about its rounded mean.
            const double rounding = sums.bias / static_cast<double>(size) - block_mean;
            const double squares = block_deviation(block, size, block_mean) -
                                   rounding * rounding * static_cast<double>(size);
            const double delta = sums.bias / static_cast<double>(size) - centre;
            const double share = static_cast<double>(size) / static_cast<double>(begin + size);
            centre += delta * share;
            deviation += squares + delta * delta * share * static_cast<double>(begin);
        }
        mean[row] = static_cast<Wide>(centre);
        rstd[row] =
            static_cast<Wide>(1.0 / std::sqrt(deviation / static_cast<double>(count) + eps));
    }
}

template <bool HasInput, class Wide, class T>
void by_channel(const T* input, const T* grad_output, const Wide* mean, const Wide* rstd,
                Wide* weight, Wide* bias, const AffineShape& shape, Launch launch) {
    const int64_t per_group = shape.channels / shape.groups;
#pragma omp parallel for num_threads(team(shape, launch)) schedule(static)
    for (int64_t row = 0; row < shape.batch * shape.channels; ++row) {
        const int64_t sample = row / shape.channels, channel = row % shape.channels;
        const int64_t group = sample * shape.groups + channel / per_group;
        const T* grads =
            grad_output + sample * shape.grad_stride[0] + channel * shape.grad_stride[1];
        const T* inputs =
            HasInput ? input + sample * shape.input_stride[0] + channel * shape.input_stride[1]
                     : nullptr;
        const Wide centre = mean ? mean[group] : Wide(0);
        Sums sums;
        Wide input_block[kBlock], grad_block[kBlock];
        for (int64_t begin = 0; begin < shape.positions; begin += kBlock) {
            const int64_t count = std::min(kBlock, shape.positions - begin);
            const Wide* g = widened(grads + begin, count, grad_block);
            const Wide* x = nullptr;
            if constexpr (HasInput) x = widened(inputs + begin, count, input_block);
            add_block<HasInput>(x, g, count, centre, sums);
        }
        const double scale = rstd ? static_cast<double>(rstd[group]) : 1.0;
        if constexpr (HasInput) weight[row] = static_cast<Wide>(sums.weight * scale);
        if (bias) bias[row] = static_cast<Wide>(sums.bias);
    }
}

template <bool HasInput, class Wide, class T>
void by_position(const T* input, const T* grad_output, const Wide* mean, const Wide* rstd,
                 Wide* weight, Wide* bias, const AffineShape& shape, Launch launch) {
    const int64_t chunks = (shape.channels + kBlockColumns - 1) / kBlockColumns;
#pragma omp parallel for num_threads(team(shape, launch)) schedule(static)
    for (int64_t job = 0; job < shape.batch * chunks; ++job) {
        const int64_t sample = job / chunks, first = job % chunks * kBlockColumns;
        const int64_t count = std::min(kBlockColumns, shape.channels - first);
        double weight_sum[kBlockColumns] = {}, bias_sum[kBlockColumns] = {};
        for (int64_t begin = 0; begin < shape.positions; begin += kBlockRows) {
            Wide weight_part[kBlockColumns] = {}, bias_part[kBlockColumns] = {};
            const int64_t end = std::min(shape.positions, begin + kBlockRows);
            for (int64_t at = begin; at < end; ++at) {
                const T* g =
                    grad_output + sample * shape.grad_stride[0] + at * shape.grad_stride[1] + first;
                for (int64_t i = 0; i < count; ++i) bias_part[i] += static_cast<Wide>(widen(g[i]));
                if constexpr (HasInput) {
                    const T* x =
                        input + sample * shape.input_stride[0] + at * shape.input_stride[1] + first;
                    const Wide centre = mean ? mean[sample * shape.positions + at] : Wide(0);
                    const Wide scale = rstd ? rstd[sample * shape.positions + at] : Wide(1);
                    for (int64_t i = 0; i < count; ++i) {
                        weight_part[i] += static_cast<Wide>(widen(g[i])) *
                                          ((static_cast<Wide>(widen(x[i])) - centre) * scale);
                    }
                }
            }
            for (int64_t i = 0; i < count; ++i) {
                weight_sum[i] += static_cast<double>(weight_part[i]);
                bias_sum[i] += static_cast<double>(bias_part[i]);
            }
        }
        const int64_t row = sample * shape.channels + first;
        for (int64_t i = 0; i < count; ++i) {
            if constexpr (HasInput) weight[row + i] = static_cast<Wide>(weight_sum[i]);
            if (bias) bias[row + i] = static_cast<Wide>(bias_sum[i]);
        }
    }
}

}  // namespace

void affine_grads(const void* input, const void* grad_output, DType type, const void* mean,
                  const void* rstd, void* weight, void* bias, const AffineShape& shape,
                  Launch launch) {
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        using Wide = decltype(widen(*tag));
        const auto by_channels = weight ? by_channel<true, Wide, T> : by_channel<false, Wide, T>;
        const auto by_positions = weight ? by_position<true, Wide, T> : by_position<false, Wide, T>;
        const auto run = shape.channels_last ? by_positions : by_channels;
        run(static_cast<const T*>(input), static_cast<const T*>(grad_output),
            static_cast<const Wide*>(mean), static_cast<const Wide*>(rstd),
            static_cast<Wide*>(weight), static_cast<Wide*>(bias), shape, launch);
    });
}

void row_statistics(const void* input, DType type, void* mean, void* rstd, std::int64_t rows,
                    std::int64_t count, double eps, Launch launch) {
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        using Wide = decltype(widen(*tag));
        moments(static_cast<const T*>(input), static_cast<Wide*>(mean), static_cast<Wide*>(rstd),
                rows, count, eps, launch);
    });
}

}  // namespace dpkernels::cpu
