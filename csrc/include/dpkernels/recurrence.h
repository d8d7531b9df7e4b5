// One step of an LSTM forwards and backwards: everything that lies between its matrix products.
#pragma once

#include <cstdint>

#include "dpkernels/types.h"

namespace dpkernels::DPKERNELS_DEVICE {

// An LSTM keeps N rows of all its steps; a step has `rows` of them from row `first` on, and `width`
// is H. Gates are input, forget, new and output side by side. Rows are contiguous, results do not
// depend on the number of threads.

// i, f, o = sigmoid, n = tanh; c' = f c + i n; h' = o tanh(c')
void lstm_step(float* gates,         // [N, 4H]: sums, which become the gates' values
               const float* before,  // [rows, H]: the cells before this step
               float* cell,          // [N, H]
               float* cell_tanh,     // [N, H]
               float* hidden,        // [N, H]
               std::int64_t first, std::int64_t rows, std::int64_t width, Launch launch);

void lstm_step_backward(float* grad_gates,         // [N, 4H]: gradient at the sums
                        float* grad_cell,          // [rows, H]: at the cells; becomes that before
                        const float* grad_hidden,  // [rows, H]: at h'
                        const float* gates,        // [N, 4H]: values
                        const float* before,       // [N, H]: the cells before each step
                        const float* cell_tanh,    // [N, H]
                        std::int64_t first, std::int64_t rows, std::int64_t width, Launch launch);

}  // namespace dpkernels::DPKERNELS_DEVICE
