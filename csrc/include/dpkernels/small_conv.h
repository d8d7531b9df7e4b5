// Per-sample weight gradients of convolutions with at most 32 channels, on matrix units.
#pragma once

#include "dpkernels/conv.h"

namespace dpkernels::DPKERNELS_DEVICE {

// Products of the operands' type (float32 as TF32), sums in float32. A sample's tiles of positions
// are divided evenly among `slots`, which are added in order: the same bits every time. Groups and
// dilation must be 1, kernel sizes at most 3 and strides at most 2.
void small_conv_grad_sample(const void* input,        // [B, Cin, D, H, W], strides as in geometry
                            const void* grad_output,  // [B, Cout, D', H', W'], likewise
                            DType type,               // of both, not float64
                            float* partials,     // [B, slots, Cout, Cin, kD, kH, kW], if slots > 1
                            float* grad_sample,  // [B, Cout, Cin, kD, kH, kW]
                            const ConvGeometry& geometry, std::int64_t slots, Launch launch);

}  // namespace dpkernels::DPKERNELS_DEVICE
