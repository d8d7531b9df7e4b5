// Per-sample weight gradients of convolutions over one to three spatial axes.
#pragma once

#include <cstdint>

#include "dpkernels/types.h"

namespace dpkernels {

// A convolution on [D, H, W]; missing axes have extent 1, kernel 1, stride 1, padding 0.
struct ConvGeometry {
    std::int64_t batch;
    std::int64_t channels_in;
    std::int64_t channels_out;
    std::int64_t groups;
    std::int64_t input[3];
    std::int64_t output[3];  // may be smaller than input has windows
    std::int64_t kernel[3];
    std::int64_t stride[3];
    std::int64_t padding[3];
    std::int64_t dilation[3];
    std::int64_t input_stride[5];  // elements, of [B, Cin, D, H, W]; any value
    std::int64_t grad_stride[5];   // elements, of [B, Cout, D', H', W']; any value
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
