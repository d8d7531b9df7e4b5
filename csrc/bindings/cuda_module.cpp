#include "bindings/bindings.h"
#include "dpkernels/noise.h"
#include "dpkernels/small_conv.h"

PYBIND11_MODULE(_cuda, m) {
    using namespace dpkernels;
    m.doc() = "CUDA kernels of dpkernels.";
    m.attr("interface") = kInterface;
    m.attr("architectures") = DPKERNELS_CUDA_ARCHITECTURES;
    define(m, "clip_factor", cuda::clip_factor);
    define(m, "finish_grads", cuda::finish_grads);
    define(m, "chacha20_blocks", cuda::chacha20_blocks);
    define(m, "standard_normals", cuda::standard_normals);
    define(m, "gaussian_noise", cuda::gaussian_noise);
    define(m, "small_conv_grad_sample", cuda::small_conv_grad_sample);
}
