#include "dpkernels/small_conv.h"

#include "bindings/bindings.h"
#include "bindings/conv_geometry.h"

namespace dpkernels::DPKERNELS_DEVICE {

void register_small_conv(py::module_& m) {
    m.def(
        "small_conv_grad_sample",
        [](Pointer input, Strides input_stride, Pointer grad_output, Strides grad_stride,
           DType type, Pointer partials, Pointer grad_sample, Counts counts, Axes input_size,
           Axes output_size, Axes kernel, Axes stride, Axes padding, Axes dilation,
           std::int64_t slots, Launch launch) {
            const Sizes sizes = {input_size, output_size, kernel, stride, padding, dilation};
            small_conv_grad_sample(input, grad_output, type, partials, grad_sample,
                                   conv_geometry(counts, sizes, input_stride, grad_stride), slots,
                                   launch);
        },
        ReleaseGil());
}

}  // namespace dpkernels::DPKERNELS_DEVICE
