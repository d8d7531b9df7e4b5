#include "dpkernels/clip.h"

#include "bindings/bindings.h"

namespace dpkernels::DPKERNELS_DEVICE {

void register_clip(py::module_& m) {
    m.def(
        "clip_factor",
        [](Pointer factor, Pointer norm_sq, DType type, std::int64_t batch, double max_grad_norm,
           double gamma, Launch launch) {
            clip_factor(factor, norm_sq, type, batch, max_grad_norm, gamma, launch);
        },
        ReleaseGil());
    m.def(
        "finish_grad",
        [](Pointer out, DType out_type, Pointer grad_sample, DType sample_type, Pointer factor,
           std::int64_t batch, std::int64_t numel, double noise_std, double scale, Key key,
           std::uint64_t block, bool accumulate, Launch launch) {
            finish_grad(out, out_type, grad_sample, sample_type, factor, batch, numel, noise_std,
                        scale, key, block, accumulate, launch);
        },
        ReleaseGil());
}

}  // namespace dpkernels::DPKERNELS_DEVICE
