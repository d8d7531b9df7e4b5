#include "dpkernels/linear.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/bindings.h"

namespace dpkernels::DPKERNELS_DEVICE {

void register_linear(py::module_& m) {
    using Strides = std::array<std::int64_t, 2>;
    m.def(
        "gram_norm_sq",
        [](Pointer norm_sq, Pointer activations, Strides activation_strides, std::int64_t inputs,
           Pointer grad_output, Strides grad_strides, std::int64_t outputs, std::int64_t batch,
           std::int64_t positions, Launch launch) {
            const Rows a = {activations, activation_strides[0], activation_strides[1], inputs};
            const Rows g = {grad_output, grad_strides[0], grad_strides[1], outputs};
            gram_norm_sq(norm_sq, a, g, batch, positions, launch);
        },
        ReleaseGil());
}

}  // namespace dpkernels::DPKERNELS_DEVICE
