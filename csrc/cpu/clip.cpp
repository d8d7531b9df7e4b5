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

// A sample whose factor is not 0. Factors of float tensors are floats, exactly.
struct Kept {
    std::int64_t sample;
    double factor;
};

std::vector<Kept> kept_samples(const Finish& tensor) {
    std::vector<Kept> kept;
    for (std::int64_t b = 0; b < tensor.batch; ++b) {
        const double factor = tensor.out_type == DType::float64
                                  ? static_cast<const double*>(tensor.clip_factor)[b]
                                  : static_cast<const float*>(tensor.clip_factor)[b];
        if (factor != 0.0) kept.push_back({b, factor});
    }
    return kept;
}

// sum[i] += sum of factor * grad_sample[sample, begin + i] over `count` samples, read side by side.
template <int count, class Wide, class T>
void add_samples(Wide* sum,  // [length]
                 const T* grad_sample, const Kept* kept, std::int64_t numel, std::int64_t begin,
                 std::int64_t length) {
    const T* values[count];
    Wide factors[count];
    for (int r = 0; r < count; ++r) {
        values[r] = grad_sample + kept[r].sample * numel + begin;
        factors[r] = static_cast<Wide>(kept[r].factor);
    }
    for (std::int64_t i = 0; i < length; ++i) {
        Wide total = sum[i];
        for (int r = 0; r < count; ++r)
            total += factors[r] * static_cast<Wide>(widen(values[r][i]));
        sum[i] = total;
    }
}

// Elements [begin, begin + length) of one tensor.
template <class Wide, class Out, class T>
void finish(Out* out,              // [numel]
            const T* grad_sample,  // [batch, numel]
            const Finish& tensor, const std::vector<Kept>& kept, std::int64_t begin,
            std::int64_t length, Wide noise_std, Wide scale, const Key& key) {
    Wide sum[kChunk];
    for (std::int64_t i = 0; i < length; ++i) {
        sum[i] = tensor.accumulate ? static_cast<Wide>(widen(out[begin + i])) : Wide(0);
    }
    const Kept* next = kept.data();
    const Kept* const end = next + kept.size();
    for (; end - next >= 4; next += 4) {
        add_samples<4>(sum, grad_sample, next, tensor.numel, begin, length);
    }
    for (; next < end; ++next) {
        add_samples<1>(sum, grad_sample, next, tensor.numel, begin, length);
    }
    if (noise_std != Wide(0)) {
        Wide z[kChunk];
        normals(z, length, key, tensor.block + static_cast<std::uint64_t>(begin / kPerBlock));
        for (std::int64_t i = 0; i < length; ++i) sum[i] += noise_std * z[i];
    }
    for (std::int64_t i = 0; i < length; ++i) out[begin + i] = narrow<Out>(scale * sum[i]);
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

void finish_grads(const std::vector<Finish>& tensors, double noise_std, double scale, Key key,
                  Launch launch) {
    std::vector<std::vector<Kept>> kept;
    std::vector<std::int64_t> sizes;
    for (const Finish& tensor : tensors) {
        kept.push_back(kept_samples(tensor));
        sizes.push_back(tensor.numel);
    }
    for_chunks_of(sizes, launch.threads, [&](std::size_t at, std::int64_t begin, std::int64_t end) {
        const Finish& tensor = tensors[at];
        with_type(tensor.out_type, [&](auto* out_tag) {
            using Wide = decltype(widen(*out_tag));
            auto* out = static_cast<decltype(out_tag)>(tensor.out);
            with_type(tensor.sample_type, [&](auto* sample_tag) {
                using Sample = std::remove_pointer_t<decltype(sample_tag)>;
                const auto* samples = static_cast<const Sample*>(tensor.grad_sample);
                finish(out, samples, tensor, kept[at], begin, end - begin,
                       static_cast<Wide>(noise_std), static_cast<Wide>(scale), key);
            });
        });
    });
}

}  // namespace dpkernels::cpu
