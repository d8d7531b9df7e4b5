#include "dpkernels/clip.h"

#include <pybind11/stl.h>

#include "bindings/bindings.h"

namespace pybind11::detail {

// (out, out_type, grad_sample, sample_type, clip_factor, batch, numel, block, accumulate)
template <>
struct type_caster<dpkernels::DPKERNELS_DEVICE::Finish> {
    PYBIND11_TYPE_CASTER(dpkernels::DPKERNELS_DEVICE::Finish, const_name("finish"));

    bool load(handle source, bool) {
        if (!isinstance<tuple>(source)) return false;
        const auto tensor = reinterpret_borrow<tuple>(source);
        if (tensor.size() != 9) return false;
        value.out = tensor[0].cast<dpkernels::Pointer>();
        value.out_type = tensor[1].cast<dpkernels::DType>();
        value.grad_sample = tensor[2].cast<dpkernels::Pointer>();
        value.sample_type = tensor[3].cast<dpkernels::DType>();
        value.clip_factor = tensor[4].cast<dpkernels::Pointer>();
        value.batch = tensor[5].cast<std::int64_t>();
        value.numel = tensor[6].cast<std::int64_t>();
        value.block = tensor[7].cast<std::uint64_t>();
        value.accumulate = tensor[8].cast<bool>();
        return true;
    }
};

}  // namespace pybind11::detail

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
        "finish_grads",
        [](const std::vector<Finish>& tensors, double noise_std, double scale, Key key,
           Launch launch) { finish_grads(tensors, noise_std, scale, key, launch); },
        ReleaseGil());
}

}  // namespace dpkernels::DPKERNELS_DEVICE
