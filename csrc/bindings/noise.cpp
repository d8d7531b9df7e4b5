#include "dpkernels/noise.h"

#include "bindings/bindings.h"

namespace dpkernels::DPKERNELS_DEVICE {

void register_noise(py::module_& m) {
    m.def(
        "chacha20_blocks",
        [](Pointer words, std::int64_t blocks, Key key, std::uint64_t counter, std::uint64_t nonce,
           Launch launch) { chacha20_blocks(words, blocks, key, counter, nonce, launch); },
        ReleaseGil());
    m.def(
        "standard_normals",
        [](Pointer z, DType type, Pointer words, std::int64_t blocks, Launch launch) {
            standard_normals(z, type, words, blocks, launch);
        },
        ReleaseGil());
    m.def(
        "gaussian_noise",
        [](Pointer tensor, DType type, std::int64_t numel, double noise_std, Key key,
           std::uint64_t block,
           Launch launch) { gaussian_noise(tensor, type, numel, noise_std, key, block, launch); },
        ReleaseGil());
}

}  // namespace dpkernels::DPKERNELS_DEVICE
