#include "dpkernels/conv.h"

#include "bindings/bindings.h"
#include "bindings/conv_geometry.h"

namespace dpkernels::DPKERNELS_DEVICE {

void register_conv(py::module_& m) {
    m.def(
        "conv_grad_sample",
        [](Pointer input, Strides input_stride, Pointer grad_output, Strides grad_stride,
           Pointer grad_sample, Counts counts, Axes input_size, Axes output_size, Axes kernel,
           Axes stride, Axes padding, Axes dilation, Launch launch) {
            const Sizes sizes = {input_size, output_size, kernel, stride, padding, dilation};
            conv_grad_sample(input, grad_output, grad_sample,
                             conv_geometry(counts, sizes, input_stride, grad_stride), launch);
        },
        ReleaseGil());
}

}  // namespace dpkernels::DPKERNELS_DEVICE
