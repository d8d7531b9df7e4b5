// Per-sample gradients of scales and shifts: biases, and the affine part of normalisation layers.
#pragma once

#include <array>
#include <cstdint>

#include "dpkernels/types.h"

namespace dpkernels {

// Strides are in elements, of the first two axes; the last axis is contiguous.
struct AffineShape {
    std::int64_t batch;
    std::int64_t channels;
    std::int64_t positions;
    std::int64_t groups;  // of channels with common statistics; not read for channels last
    std::array<std::int64_t, 2> input_stride;
    std::array<std::int64_t, 2> grad_stride;
    bool channels_last;  // operands are [B, T, C] and a statistic belongs to a position
};

namespace DPKERNELS_DEVICE {

// weight = sum_t G * (x - mean) * rstd, bias = sum_t G. Results and statistics are float32, or
// float64 for float64 elements. Every element of weight and bias is written, in an order of
// additions that does not depend on the number of threads.
void affine_grads(const void* input,        // [B, C, T] or [B, T, C]; read if weight is wanted
                  const void* grad_output,  // [B, C, T] or [B, T, C]
                  DType type,               // of both
                  const void* mean,         // [B, groups] or [B, T]; null for mean 0 and rstd 1
                  const void* rstd,         // [B, groups] or [B, T]
                  void* weight,             // [B, C]; null for the bias alone
                  void* bias,               // [B, C]; null for the weight alone
                  const AffineShape& shape, Launch launch);

// Mean and 1 / sqrt(variance + eps) of every row, float32 (float64 for float64 elements).
void row_statistics(const void* input,  // [rows, count]
                    DType type,
                    void* mean,  // [rows]
                    void* rstd,  // [rows]
                    std::int64_t rows, std::int64_t count, double eps, Launch launch);

}  // namespace DPKERNELS_DEVICE
}  // namespace dpkernels
