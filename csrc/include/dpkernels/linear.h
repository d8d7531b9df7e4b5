// Per-sample gradient norms of linear layers.
#pragma once

#include "dpkernels/types.h"

namespace dpkernels::DPKERNELS_DEVICE {

// A [batch, positions, features] tensor of floats whose features lie side by side.
struct Rows {
    const float* values;
    std::int64_t sample_stride;    // elements
    std::int64_t position_stride;  // elements
    std::int64_t features;
};

// norm_sq[b] = sum_{t,s} <A_t, A_s> <G_t, G_s>, never negative. The same inputs give the same bits
// for any number of threads; a NaN stays in its own sample.
void gram_norm_sq(float* norm_sq,  // [batch]
                  const Rows& activations, const Rows& grad_output, std::int64_t batch,
                  std::int64_t positions, Launch launch);

}  // namespace dpkernels::DPKERNELS_DEVICE
