#include "dpkernels/affine.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/bindings.h"

namespace dpkernels::DPKERNELS_DEVICE {

namespace {

using Sizes = std::array<std::int64_t, 4>;
using Strides = std::array<std::int64_t, 2>;

template <auto Kernel>
void define(py::module_& m, const char* name) {
    m.def(
        name,
        [](Pointer input, Strides input_stride, Pointer grad_output, Strides grad_stride,
           DType type, Pointer mean, Pointer rstd, Pointer weight, Pointer bias, Sizes sizes,
           Launch launch) {
            const AffineShape shape = {sizes[0],
                                       sizes[1],
                                       sizes[2],
                                       sizes[3],
                                       {input_stride[0], input_stride[1]},
                                       {grad_stride[0], grad_stride[1]}};
            Kernel(input, grad_output, type, mean, rstd, weight, bias, shape, launch);
        },
        ReleaseGil());
}

}  // namespace

void register_affine(py::module_& m) {
    define<channel_grads>(m, "channel_grads");
    define<position_grads>(m, "position_grads");
    m.def(
        "row_statistics",
        [](Pointer input, DType type, Pointer mean, Pointer rstd, std::int64_t rows,
           std::int64_t count, double eps,
           Launch launch) { row_statistics(input, type, mean, rstd, rows, count, eps, launch); },
        ReleaseGil());
}

}  // namespace dpkernels::DPKERNELS_DEVICE
