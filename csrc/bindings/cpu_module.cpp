#include "bindings/bindings.h"

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of dpkernels.";
    m.attr("interface") = dpkernels::kInterface;
    m.attr("instruction_set") = DPKERNELS_INSTRUCTION_SET;
    dpkernels::cpu::register_affine(m);
    dpkernels::cpu::register_clip(m);
    dpkernels::cpu::register_conv(m);
    dpkernels::cpu::register_embedding(m);
    dpkernels::cpu::register_linear(m);
    dpkernels::cpu::register_noise(m);
    dpkernels::cpu::register_recurrence(m);
}
