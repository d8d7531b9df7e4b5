// Per-sample weight gradients of convolutions over one to three spatial axes.
#pragma once

#include <array>
#include <cstdint>

#include "dpkernels/types.h"

namespace dpkernels {

// A convolution on [D, H, W]; missing axes have extent 1, kernel 1, stride 1, padding 0.
struct ConvGeometry {
    std::int64_t batch;
    std::int64_t channels_in;
    std::int64_t channels_out;
    std::int64_t groups;
    std::array<std::int64_t, 3> input;
    std::array<std::int64_t, 3> output;  // may be smaller than input has windows
    std::array<std::int64_t, 3> kernel;
    std::array<std::int64_t, 3> stride;
    std::array<std::int64_t, 3> padding;
    std::array<std::int64_t, 3> dilation;
    std::array<std::int64_t, 5> input_stride;  // elements, of [B, Cin, D, H, W]; any value
    std::array<std::int64_t, 5> grad_stride;   // elements, of [B, Cout, D', H', W']; any value
};

namespace DPKERNELS_DEVICE {

// Every element of grad_sample is written. The same inputs give the same bits for any number of
// threads. Samples do not touch each other: a NaN stays in its own sample.
void conv_grad_sample(const float* input,        // [B, Cin, D, H, W], strides as in geometry
                      const float* grad_output,  // [B, Cout, D', H', W'], likewise
                      float* grad_sample,        // [B, Cout, Cin / groups, kD, kH, kW]
                      const ConvGeometry& geometry, Launch launch);

}  // namespace DPKERNELS_DEVICE
}  // namespace dpkernels
