// The weight of one sample in the clipped sum.
#pragma once

#include <cmath>

#include "common/platform.h"

namespace dpkernels {

// min(1, C / norm), or C / (norm + gamma) where gamma > 0; 0 where the norm is not finite. Ratios
// are shrunk by two units of rounding of T, so that factor * norm <= C after rounding too.
template <class T>
DPK_INLINE T clip_factor_of(T norm_sq, double max_grad_norm, double gamma) {
    const double shrink = 1.0 - (sizeof(T) == sizeof(float) ? 0x1p-22 : 0x1p-51);
    const double square = static_cast<double>(norm_sq);
    const double norm = sqrt(square < 0.0 ? 0.0 : square);
    const bool whole = gamma == 0.0 && norm <= max_grad_norm;
    const double factor = whole ? 1.0 : max_grad_norm / (norm + gamma) * shrink;
    return norm < static_cast<double>(INFINITY) ? static_cast<T>(factor) : T(0);
}

}  // namespace dpkernels
