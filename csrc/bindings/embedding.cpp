#include "dpkernels/embedding.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/bindings.h"

namespace dpkernels::DPKERNELS_DEVICE {

namespace {

using Sizes = std::array<std::int64_t, 3>;
using Strides = std::array<std::int64_t, 2>;

EmbeddingShape shape_of(Sizes sizes, std::int64_t padding, Strides index, Strides grad) {
    return {sizes[0], sizes[1], sizes[2], padding, {index[0], index[1]}, {grad[0], grad[1]}};
}

}  // namespace

void register_embedding(py::module_& m) {
    m.def(
        "embedding_norm_sq",
        [](Pointer norm_sq, Pointer indices, Strides index_stride, Pointer grad_output,
           Strides grad_stride, DType type, Sizes sizes, std::int64_t padding, Launch launch) {
            const EmbeddingShape shape = shape_of(sizes, padding, index_stride, grad_stride);
            embedding_norm_sq(norm_sq, indices, grad_output, type, shape, launch);
        },
        ReleaseGil());
    m.def(
        "embedding_grad_sample",
        [](Pointer grads, Pointer indices, Strides index_stride, Pointer grad_output,
           Strides grad_stride, DType type, std::int64_t rows, Sizes sizes, std::int64_t padding,
           Launch launch) {
            const EmbeddingShape shape = shape_of(sizes, padding, index_stride, grad_stride);
            embedding_grad_sample(grads, indices, grad_output, type, rows, shape, launch);
        },
        ReleaseGil());
    m.def(
        "embedding_clipped_grad",
        [](Pointer table, Pointer indices, Strides index_stride, Pointer grad_output,
           Strides grad_stride, DType type, Pointer factor, std::int64_t rows, Sizes sizes,
           std::int64_t padding, Launch launch) {
            const EmbeddingShape shape = shape_of(sizes, padding, index_stride, grad_stride);
            embedding_clipped_grad(table, indices, grad_output, type, factor, rows, shape, launch);
        },
        ReleaseGil());
}

}  // namespace dpkernels::DPKERNELS_DEVICE
