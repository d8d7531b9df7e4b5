#include "dpkernels/recurrence.h"

#include <algorithm>
#include <cstring>

#include "cpu/elementary.h"
#include "cpu/parallel.h"

namespace dpkernels::cpu {

namespace {

using std::int64_t;

// Values that one element of a step costs, next to a plain loop's.
constexpr int64_t kWork = 8;

int team(int64_t rows, int64_t width, Launch launch) {
    return team_for(rows * width * kWork, launch);
}

// The first `count` values; the other lanes are 0.
DPK_INLINE Floats load(const float* address, int64_t count) {
    Floats value = {};
    if (count >= kLanes) {
        std::memcpy(&value, address, sizeof(value));
    } else {
        std::memcpy(&value, address, sizeof(float) * static_cast<std::size_t>(count));
    }
    return value;
}

DPK_INLINE void store(float* address, Floats value, int64_t count) {
    if (count >= kLanes) {
        std::memcpy(address, &value, sizeof(value));
    } else {
        std::memcpy(address, &value, sizeof(float) * static_cast<std::size_t>(count));
    }
}

}  // namespace

void lstm_step(float* gates, const float* before, float* cell, float* cell_tanh, float* hidden,
               int64_t first, int64_t rows, int64_t width, Launch launch) {
#pragma omp parallel for num_threads(team(rows, width, launch)) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        float* sums = gates + (first + row) * 4 * width;
        const int64_t at = (first + row) * width;
        for (int64_t j = 0; j < width; j += kLanes) {
            const int64_t count = width - j;
            const Floats in = sigmoid(load(sums + j, count));
            const Floats forget = sigmoid(load(sums + width + j, count));
            const Floats fresh = hyperbolic_tangent(load(sums + 2 * width + j, count));
            const Floats out = sigmoid(load(sums + 3 * width + j, count));
            const Floats c = forget * load(before + row * width + j, count) + in * fresh;
            const Floats c_tanh = hyperbolic_tangent(c);
            store(sums + j, in, count);
            store(sums + width + j, forget, count);
            store(sums + 2 * width + j, fresh, count);
            store(sums + 3 * width + j, out, count);
            store(cell + at + j, c, count);
            store(cell_tanh + at + j, c_tanh, count);
            store(hidden + at + j, out * c_tanh, count);
        }
    }
}

void lstm_step_backward(float* grad_gates, float* grad_cell, const float* grad_hidden,
                        const float* gates, const float* before, const float* cell_tanh,
                        int64_t first, int64_t rows, int64_t width, Launch launch) {
#pragma omp parallel for num_threads(team(rows, width, launch)) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float* values = gates + (first + row) * 4 * width;
        float* grads = grad_gates + (first + row) * 4 * width;
        const int64_t at = (first + row) * width;
        for (int64_t j = 0; j < width; j += kLanes) {
            const int64_t count = width - j;
            const Floats in = load(values + j, count);
            const Floats forget = load(values + width + j, count);
            const Floats fresh = load(values + 2 * width + j, count);
            const Floats out = load(values + 3 * width + j, count);
            const Floats c_tanh = load(cell_tanh + at + j, count);
            const Floats at_hidden = load(grad_hidden + row * width + j, count);
            const Floats at_cell = load(grad_cell + row * width + j, count) +
                                   at_hidden * out * (1.0f - c_tanh * c_tanh);
            const Floats old = load(before + at + j, count);
            store(grads + j, at_cell * fresh * (in * (1.0f - in)), count);
            store(grads + width + j, at_cell * old * (forget * (1.0f - forget)), count);
            store(grads + 2 * width + j, at_cell * in * (1.0f - fresh * fresh), count);
            store(grads + 3 * width + j, at_hidden * c_tanh * (out * (1.0f - out)), count);
            store(grad_cell + row * width + j, at_cell * forget, count);
        }
    }
}

}  // namespace dpkernels::cpu
