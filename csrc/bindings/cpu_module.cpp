#include "bindings/bindings.h"
#include "dpkernels/noise.h"
#include "dpkernels/recurrence.h"

PYBIND11_MODULE(_cpu, m) {
    using namespace dpkernels;
    m.doc() = "CPU kernels of dpkernels.";
    m.attr("interface") = kInterface;
    m.attr("instruction_set") = DPKERNELS_INSTRUCTION_SET;
    define(m, "affine_grads", cpu::affine_grads);
    define(m, "row_statistics", cpu::row_statistics);
    define(m, "clip_factor", cpu::clip_factor);
    define(m, "finish_grads", cpu::finish_grads);
    define(m, "conv_grad_sample", cpu::conv_grad_sample);
    define(m, "embedding_norm_sq", cpu::embedding_norm_sq);
    define(m, "embedding_grad_sample", cpu::embedding_grad_sample);
    define(m, "embedding_clipped_grad", cpu::embedding_clipped_grad);
    define(m, "fingerprint", cpu::fingerprint);
    define(m, "gram_norm_sq", cpu::gram_norm_sq);
    define(m, "chacha20_blocks", cpu::chacha20_blocks);
    define(m, "standard_normals", cpu::standard_normals);
    define(m, "gaussian_noise", cpu::gaussian_noise);
    define(m, "lstm_step", cpu::lstm_step);
    define(m, "lstm_step_backward", cpu::lstm_step_backward);
}
