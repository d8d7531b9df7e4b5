// Per-sample gradients of embedding tables: [V, D] tables looked up at T positions of each sample.
#pragma once

#include <array>
#include <cstdint>

#include "dpkernels/types.h"

namespace dpkernels {

// Strides are in elements, of the first two axes; the last axis of the gradient is contiguous.
struct EmbeddingShape {
    std::int64_t batch;
    std::int64_t positions;
    std::int64_t width;
    std::int64_t padding;  // positions with this index do not count; -1 for none
    std::array<std::int64_t, 2> index_stride;
    std::array<std::int64_t, 2> grad_stride;
};

namespace DPKERNELS_DEVICE {

// Results are float32, or float64 for float64 elements, in an order of additions that does not
// depend on the number of threads. Norms are written, tables of V rows are added to; the latter
// throw std::out_of_range, before anything is written, if an index does not lie in [0, V).

// norm_sq[b] = sum_v |sum of G_t over the positions t of sample b with index v|^2
void embedding_norm_sq(void* norm_sq,                // [B]
                       const std::int64_t* indices,  // [B, T]
                       const void* grad_output,      // [B, T, D]
                       DType type, const EmbeddingShape& shape, Launch launch);

// grads[b, v] += sum of G_t over the positions t of sample b with index v
void embedding_grad_sample(void* grads,                  // [B, V, D]
                           const std::int64_t* indices,  // [B, T]
                           const void* grad_output,      // [B, T, D]
                           DType type, std::int64_t rows, const EmbeddingShape& shape,
                           Launch launch);

// table[v] += sum of factor[b] * G_t over all positions with index v; a sample whose factor is 0 is
// not read.
void embedding_clipped_grad(void* table,                  // [V, D]
                            const std::int64_t* indices,  // [B, T]
                            const void* grad_output,      // [B, T, D]
                            DType type,
                            const void* factor,  // [B], of the result's type
                            std::int64_t rows, const EmbeddingShape& shape, Launch launch);

}  // namespace DPKERNELS_DEVICE
}  // namespace dpkernels
