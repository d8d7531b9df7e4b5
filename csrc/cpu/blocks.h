// Sums over blocks of elements, in vectors of the elements' own width; callers add the blocks up in
// double, so that the error does not grow with the number of elements.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/elements.h"
#include "cpu/simd.h"

namespace dpkernels::cpu {

constexpr std::int64_t kBlock = 1024;

template <class Wide>
struct Lanes {
    static constexpr std::int64_t count = 4 * kLanes / sizeof(Wide);
    typedef Wide Vector __attribute__((vector_size(4 * kLanes)));
    typedef Wide Unaligned
        __attribute__((vector_size(4 * kLanes), aligned(alignof(Wide)), may_alias));
};

template <class Wide>
DPK_INLINE double sum_lanes(const typename Lanes<Wide>::Vector (&parts)[4]) {
    const auto all = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    Wide lanes[Lanes<Wide>::count];
    std::memcpy(lanes, &all, sizeof(lanes));
    for (std::int64_t half = Lanes<Wide>::count / 2; half > 0; half /= 2) {
        for (std::int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return static_cast<double>(lanes[0]);
}

// The block as float or double: itself, or a copy in `buffer`.
template <class Wide, class T>
DPK_INLINE const Wide* widened(const T* source, std::int64_t count, Wide* buffer) {
    if constexpr (std::is_same_v<T, Wide>) {
        return source;
    } else {
        for (std::int64_t i = 0; i < count; ++i) buffer[i] = widen(source[i]);
        return buffer;
    }
}

// Sum of (x - mean)^2 over one block.
template <class Wide>
DPK_INLINE double block_deviation(const Wide* input, std::int64_t count, Wide mean) {
    using Unaligned = typename Lanes<Wide>::Unaligned;
    constexpr std::int64_t lanes = Lanes<Wide>::count;
    typename Lanes<Wide>::Vector parts[4] = {};
    const auto add_vector = [&](std::int64_t at, int part) {
        const auto deviation = *reinterpret_cast<const Unaligned*>(input + at) - mean;
        parts[part] += deviation * deviation;
    };
    std::int64_t i = 0;
    for (; i + 4 * lanes <= count; i += 4 * lanes) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) add_vector(i + part * lanes, part);
    }
    for (; i + lanes <= count; i += lanes) add_vector(i, 0);
    Wide rest = 0;
    for (; i < count; ++i) rest += (input[i] - mean) * (input[i] - mean);
    return sum_lanes<Wide>(parts) + static_cast<double>(rest);
}

}  // namespace dpkernels::cpu
