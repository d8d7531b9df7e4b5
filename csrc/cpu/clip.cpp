#include "dpkernels/clip.h"

#include <vector>

#include "common/clip_factor.h"
#include "cpu/elements.h"
#include "cpu/normals.h"
#include "cpu/parallel.h"

namespace dpkernels::cpu {

namespace {

template <class T>
void factors(T* factor,         // [batch]
             const T* norm_sq,  // [batch]
             std::int64_t batch, double max_grad_norm, double gamma) {
    for (std::int64_t b = 0; b < batch; ++b) {
        factor[b] = clip_factor_of(norm_sq[b], max_grad_norm, gamma);
    }
}

// One sample whose factor is not 0.
template <class Wide, class T>
struct Row {
    const T* values;  // [numel]
    Wide factor;
};

template <class Wide, class T>
std::vector<Row<Wide, T>> kept_rows(const T* grad_sample,     // [batch, numel]
                                    const Wide* clip_factor,  // [batch]
                                    std::int64_t batch, std::int64_t numel) {
    std::vector<Row<Wide, T>> rows;
    for (std::int64_t b = 0; b < batch; ++b) {
        if (clip_factor[b] != Wide(0)) rows.push_back({grad_sample + b * numel, clip_factor[b]});
    }
    return rows;
}

// sum[i] += sum of factor * values[begin + i] over `count` rows, read side by side.
template <int count, class Wide, class T>
void add_rows(Wide* sum,  // [length]
              const Row<Wide, T>* rows, std::int64_t begin, std::int64_t length) {
    for (std::int64_t i = 0; i < length; ++i) {
        Wide total = sum[i];
        for (int r = 0; r < count; ++r) {
            total += rows[r].factor * static_cast<Wide>(widen(rows[r].values[begin + i]));
        }
        sum[i] = total;
    }
}

template <class Wide, class Out, class T>
void finish(Out* out,  // [numel]
            const std::vector<Row<Wide, T>>& rows, std::int64_t numel, Wide noise_std, Wide scale,
            const Key& key, std::uint64_t block, bool accumulate, int threads) {
    for_chunks(numel, threads, [&](std::int64_t begin, std::int64_t end) {
        const std::int64_t length = end - begin;
        Wide sum[kChunk];
        for (std::int64_t i = 0; i < length; ++i) {
            sum[i] = accumulate ? static_cast<Wide>(widen(out[begin + i])) : Wide(0);
        }
        std::size_t row = 0;
        for (; row + 4 <= rows.size(); row += 4) add_rows<4>(sum, &rows[row], begin, length);
        for (; row < rows.size(); ++row) add_rows<1>(sum, &rows[row], begin, length);
        if (noise_std != Wide(0)) {
            Wide z[kChunk];
            normals(z, length, key, block + static_cast<std::uint64_t>(begin / kPerBlock));
            for (std::int64_t i = 0; i < length; ++i) sum[i] += noise_std * z[i];
        }
        for (std::int64_t i = 0; i < length; ++i) out[begin + i] = narrow<Out>(scale * sum[i]);
    });
}

}  // namespace

void clip_factor(void* factor, const void* norm_sq, DType type, std::int64_t batch,
                 double max_grad_norm, double gamma, Launch) {
    if (type == DType::float64) {
        factors(static_cast<double*>(factor), static_cast<const double*>(norm_sq), batch,
                max_grad_norm, gamma);
    } else {
        factors(static_cast<float*>(factor), static_cast<const float*>(norm_sq), batch,
                max_grad_norm, gamma);
    }
}

void finish_grad(void* out, DType out_type, const void* grad_sample, DType sample_type,
                 const void* clip_factor, std::int64_t batch, std::int64_t numel, double noise_std,
                 double scale, Key key, std::uint64_t block, bool accumulate, Launch launch) {
    with_type(out_type, [=](auto* out_tag) {
        using Out = std::remove_pointer_t<decltype(out_tag)>;
        using Wide = decltype(widen(*out_tag));
        with_type(sample_type, [=](auto* sample_tag) {
            using Sample = std::remove_pointer_t<decltype(sample_tag)>;
            const auto rows = kept_rows(static_cast<const Sample*>(grad_sample),
                                        static_cast<const Wide*>(clip_factor), batch, numel);
            finish(static_cast<Out*>(out), rows, numel, static_cast<Wide>(noise_std),
                   static_cast<Wide>(scale), key, block, accumulate, launch.threads);
        });
    });
}

}  // namespace dpkernels::cpu
