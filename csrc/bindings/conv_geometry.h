// A convolution's sizes, as dpkernels/ops/conv/geometry.py hands them over.
#pragma once

#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "dpkernels/conv.h"

namespace dpkernels {

using Axes = std::array<std::int64_t, 3>;
using Strides = std::array<std::int64_t, 5>;
// batch, channels_in, channels_out, groups
using Counts = std::array<std::int64_t, 4>;
// input, output, kernel, stride, padding, dilation
using Sizes = std::array<Axes, 6>;

inline ConvGeometry conv_geometry(const Counts& counts, const Sizes& sizes,
                                  const Strides& input_stride, const Strides& grad_stride) {
    ConvGeometry geometry;
    geometry.batch = counts[0];
    geometry.channels_in = counts[1];
    geometry.channels_out = counts[2];
    geometry.groups = counts[3];
    std::int64_t* const members[] = {geometry.input,  geometry.output,  geometry.kernel,
                                     geometry.stride, geometry.padding, geometry.dilation};
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        std::copy(sizes[i].begin(), sizes[i].end(), members[i]);
    }
    std::copy(input_stride.begin(), input_stride.end(), geometry.input_stride);
    std::copy(grad_stride.begin(), grad_stride.end(), geometry.grad_stride);
    return geometry;
}

}  // namespace dpkernels
