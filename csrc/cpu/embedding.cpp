#include "dpkernels/embedding.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/elements.h"
#include "cpu/parallel.h"

namespace dpkernels::cpu {

namespace {

using std::int64_t;

// Columns of a table that one thread takes at least: they fill whole cache lines.
constexpr int64_t kColumns = 16;

using Place = std::pair<int64_t, int64_t>;  // index, position

int team(const EmbeddingShape& shape, Launch launch) {
    return team_for(shape.batch * shape.positions * shape.width, launch);
}

DPK_INLINE int64_t index_at(const int64_t* indices, int64_t sample, int64_t position,
                            const EmbeddingShape& shape) {
    return indices[sample * shape.index_stride[0] + position * shape.index_stride[1]];
}

template <class T>
DPK_INLINE const T* row_of(const T* grad_output, int64_t sample, int64_t position,
                           const EmbeddingShape& shape) {
    return grad_output + sample * shape.grad_stride[0] + position * shape.grad_stride[1];
}

template <class Wide, class T>
DPK_INLINE void add(Wide* sum, const T* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) sum[i] += widen(values[i]);
}

// The squared norm of the sum of the rows at some positions.
template <class Wide, class T>
double segment_norm_sq(const T* grads, const Place* begin, const Place* end,
                       const EmbeddingShape& shape) {
    double total = 0;
    Wide sum[kBlock];
    for (int64_t first = 0; first < shape.width; first += kBlock) {
        const int64_t count = std::min(kBlock, shape.width - first);
        const T* row = row_of(grads, 0, begin->second, shape) + first;
        const Wide* block = sum;
        if (begin + 1 == end) {
            block = widened(row, count, sum);
        } else {
            for (int64_t i = 0; i < count; ++i) sum[i] = widen(row[i]);
            for (const Place* at = begin + 1; at != end; ++at) {
                add(sum, row_of(grads, 0, at->second, shape) + first, count);
            }
        }
        total += block_deviation(block, count, Wide(0));
    }
    return total;
}

// Equal indices of a sample come together by sorting; positions stay in their order.
template <class Wide, class T>
void norms(Wide* norm_sq, const int64_t* indices, const T* grad_output, const EmbeddingShape& shape,
           Launch launch) {
#pragma omp parallel num_threads(team(shape, launch))
    {
        std::vector<Place> places;
        places.reserve(static_cast<std::size_t>(shape.positions));
#pragma omp for schedule(static)
        for (int64_t sample = 0; sample < shape.batch; ++sample) {
            places.clear();
            for (int64_t t = 0; t < shape.positions; ++t) {
                const int64_t index = index_at(indices, sample, t, shape);
                if (index != shape.padding) places.emplace_back(index, t);
            }
            std::sort(places.begin(), places.end());
            const T* grads = row_of(grad_output, sample, 0, shape);
            const Place* const end = places.data() + places.size();
            double total = 0;
            for (const Place* begin = places.data(); begin != end;) {
                const Place* next = begin + 1;
                while (next != end && next->first == begin->first) ++next;
                total += segment_norm_sq<Wide>(grads, begin, next, shape);
                begin = next;
            }
            norm_sq[sample] = static_cast<Wide>(total);
        }
    }
}

void require_rows(const int64_t* indices, int64_t rows, const EmbeddingShape& shape) {
    for (int64_t sample = 0; sample < shape.batch; ++sample) {
        for (int64_t t = 0; t < shape.positions; ++t) {
            const int64_t index = index_at(indices, sample, t, shape);
            if (index < 0 || index >= rows) {
                throw std::out_of_range(
                    "indices: " + std::to_string(index) +
                    ", expected at least 0 and less than num_embeddings=" + std::to_string(rows));
            }
        }
    }
}

// Every thread fills the tables of its samples.
template <class Wide, class T>
void tables(Wide* grads, const int64_t* indices, const T* grad_output, int64_t rows,
            const EmbeddingShape& shape, Launch launch) {
    const int64_t size = rows * shape.width;
#pragma omp parallel for num_threads(team(shape, launch)) schedule(static)
    for (int64_t sample = 0; sample < shape.batch; ++sample) {
        Wide* table = grads + sample * size;
        for (int64_t t = 0; t < shape.positions; ++t) {
            const int64_t index = index_at(indices, sample, t, shape);
            if (index == shape.padding) continue;
            add(table + index * shape.width, row_of(grad_output, sample, t, shape), shape.width);
        }
    }
}

// Every thread has columns of its own, and adds the samples up in their order.
template <class Wide, class T>
void clipped(Wide* table, const int64_t* indices, const T* grad_output, const Wide* factor,
             const EmbeddingShape& shape, Launch launch) {
    const int64_t threads = team(shape, launch);
    const int64_t share = (shape.width + threads - 1) / threads;
    const int64_t columns = std::max((share + kColumns - 1) / kColumns, int64_t{1}) * kColumns;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (int64_t first = 0; first < shape.width; first += columns) {
        const int64_t count = std::min(columns, shape.width - first);
        Wide* part = table + first;
        for (int64_t sample = 0; sample < shape.batch; ++sample) {
            const Wide scale = factor[sample];
            if (scale == 0) continue;
            for (int64_t t = 0; t < shape.positions; ++t) {
                const int64_t index = index_at(indices, sample, t, shape);
                if (index == shape.padding) continue;
                Wide* sum = part + index * shape.width;
                const T* grads = row_of(grad_output, sample, t, shape) + first;
                for (int64_t i = 0; i < count; ++i) sum[i] += scale * widen(grads[i]);
            }
        }
    }
}

}  // namespace

void embedding_norm_sq(void* norm_sq, const int64_t* indices, const void* grad_output, DType type,
                       const EmbeddingShape& shape, Launch launch) {
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        using Wide = decltype(widen(*tag));
        norms(static_cast<Wide*>(norm_sq), indices, static_cast<const T*>(grad_output), shape,
              launch);
    });
}

void embedding_grad_sample(void* grads, const int64_t* indices, const void* grad_output, DType type,
                           int64_t rows, const EmbeddingShape& shape, Launch launch) {
    require_rows(indices, rows, shape);
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        using Wide = decltype(widen(*tag));
        tables(static_cast<Wide*>(grads), indices, static_cast<const T*>(grad_output), rows, shape,
               launch);
    });
}

void embedding_clipped_grad(void* table, const int64_t* indices, const void* grad_output,
                            DType type, const void* factor, int64_t rows,
                            const EmbeddingShape& shape, Launch launch) {
    require_rows(indices, rows, shape);
    with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        using Wide = decltype(widen(*tag));
        clipped(static_cast<Wide*>(table), indices, static_cast<const T*>(grad_output),
                static_cast<const Wide*>(factor), shape, launch);
    });
}

}  // namespace dpkernels::cpu
