#include "bindings/bindings.h"

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of dpkernels.";
    m.attr("interface") = dpkernels::kInterface;
    m.attr("architectures") = DPKERNELS_CUDA_ARCHITECTURES;
    dpkernels::cuda::register_clip(m);
    dpkernels::cuda::register_noise(m);
    dpkernels::cuda::register_small_conv(m);
}
