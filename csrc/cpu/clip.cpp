#include "dpkernels/clip.h"

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

// sum[i] += f * row[i].
template <class Wide, class T>
void add_row(Wide* sum,     // [count]
             const T* row,  // [count]
             std::int64_t count, Wide f) {
    for (std::int64_t i = 0; i < count; ++i) sum[i] += f * static_cast<Wide>(widen(row[i]));
}

template <class Wide, class Out, class Sample>
void finish(Out* out,                   // [numel]
            const Sample* grad_sample,  // [batch, numel]
            const Wide* clip_factor,    // [batch]
            std::int64_t batch, std::int64_t numel, Wide noise_std, Wide scale, const Key& key,
            std::uint64_t block, bool accumulate, int threads) {
    for_chunks(numel, threads, [=](std::int64_t begin, std::int64_t end) {
        const std::int64_t count = end - begin;
        Wide sum[kChunk];
        for (std::int64_t i = 0; i < count; ++i) {
            sum[i] = accumulate ? static_cast<Wide>(widen(out[begin + i])) : Wide(0);
        }
        for (std::int64_t b = 0; b < batch; ++b) {
            if (clip_factor[b] == Wide(0)) continue;
            add_row(sum, grad_sample + b * numel + begin, count, clip_factor[b]);
        }
        if (noise_std != Wide(0)) {
            Wide z[kChunk];
            normals(z, count, key, block + static_cast<std::uint64_t>(begin / kPerBlock));
            for (std::int64_t i = 0; i < count; ++i) sum[i] += noise_std * z[i];
        }
        for (std::int64_t i = 0; i < count; ++i) out[begin + i] = narrow<Out>(scale * sum[i]);
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
            finish(static_cast<Out*>(out), static_cast<const Sample*>(grad_sample),
                   static_cast<const Wide*>(clip_factor), batch, numel,
                   static_cast<Wide>(noise_std), static_cast<Wide>(scale), key, block, accumulate,
                   launch.threads);
        });
    });
}

}  // namespace dpkernels::cpu
