#include "dpkernels/conv.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "bindings/bindings.h"

namespace dpkernels::DPKERNELS_DEVICE {

namespace {

using Axes = std::array<std::int64_t, 3>;
using Strides = std::array<std::int64_t, 5>;

template <std::size_t Count>
void assign(std::int64_t (&to)[Count], const std::array<std::int64_t, Count>& from) {
    std::copy(from.begin(), from.end(), to);
}

}  // namespace

void register_conv(py::module_& m) {
    m.def(
        "conv_grad_sample",
        [](Pointer input, Strides input_stride, Pointer grad_output, Strides grad_stride,
           Pointer grad_sample, std::array<std::int64_t, 4> channels, Axes input_size,
           Axes output_size, Axes kernel, Axes stride, Axes padding, Axes dilation, Launch launch) {
            ConvGeometry geometry;
            geometry.batch = channels[0];
            geometry.channels_in = channels[1];
            geometry.channels_out = channels[2];
            geometry.groups = channels[3];
            assign(geometry.input, input_size);
            assign(geometry.output, output_size);
            assign(geometry.kernel, kernel);
            assign(geometry.stride, stride);
            assign(geometry.padding, padding);
            assign(geometry.dilation, dilation);
            assign(geometry.input_stride, input_stride);
            assign(geometry.grad_stride, grad_stride);
            conv_grad_sample(input, grad_output, grad_sample, geometry, launch);
        },
        ReleaseGil());
}

}  // namespace dpkernels::DPKERNELS_DEVICE
