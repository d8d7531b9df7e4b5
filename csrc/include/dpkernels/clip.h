// Clip factors, the clipped sum of per-sample gradients, and the fused end of a DP step.
//
// "Accumulation type": float64 where the output is float64, float32 otherwise.
#pragma once

#include <vector>

#include "dpkernels/types.h"

namespace dpkernels::DPKERNELS_DEVICE {

// factor = min(1, C / norm), or C / (norm + gamma) where gamma > 0; 0 where the norm is not finite.
// Shrunk by two units of rounding, so that factor * norm <= C however it is computed.
void clip_factor(void* factor,         // [batch], of `type`
                 const void* norm_sq,  // [batch], of `type`
                 DType type,           // float32 or float64
                 std::int64_t batch, double max_grad_norm, double gamma, Launch launch);

// One tensor of the end of a DP step.
struct Finish {
    void* out;  // [numel], contiguous
    DType out_type;
    const void* grad_sample;  // [batch, numel], contiguous
    DType sample_type;
    const void* clip_factor;  // [batch], of the accumulation type
    std::int64_t batch;
    std::int64_t numel;
    std::uint64_t block;  // of the tensor's first noise block
    bool accumulate;
};

// For each tensor: out = scale * ((accumulate ? out : 0) + sum_b clip_factor[b] grad_sample[b]
// + noise_std * z), z as in gaussian_noise; noise_std == 0 draws nothing. Samples with factor 0 are
// never read. The tensors must not overlap.
void finish_grads(const std::vector<Finish>& tensors, double noise_std, double scale, Key key,
                  Launch launch);

}  // namespace dpkernels::DPKERNELS_DEVICE
