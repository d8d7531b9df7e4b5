#include "dpkernels/recurrence.h"

#include "bindings/bindings.h"

namespace dpkernels::DPKERNELS_DEVICE {

void register_recurrence(py::module_& m) {
    m.def(
        "lstm_step",
        [](Pointer gates, Pointer before, Pointer cell, Pointer cell_tanh, Pointer hidden,
           std::int64_t first, std::int64_t rows, std::int64_t width, Launch launch) {
            lstm_step(gates, before, cell, cell_tanh, hidden, {first, rows, width}, launch);
        },
        ReleaseGil());
    m.def(
        "lstm_step_backward",
        [](Pointer grad_gates, Pointer grad_cell, Pointer grad_hidden, Pointer gates,
           Pointer before, Pointer cell_tanh, std::int64_t first, std::int64_t rows,
           std::int64_t width, Launch launch) {
            lstm_step_backward(grad_gates, grad_cell, grad_hidden, gates, before, cell_tanh,
                               {first, rows, width}, launch);
        },
        ReleaseGil());
}

}  // namespace dpkernels::DPKERNELS_DEVICE
