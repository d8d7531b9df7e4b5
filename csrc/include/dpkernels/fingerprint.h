// Fingerprints of rows: sums that tell whether two rows hold the same bits and the same values.
#pragma once

#include <cstdint>

#include "dpkernels/types.h"

namespace dpkernels {

// Element types of a fingerprint: the floating-point types under their codes in DType, then
// integers.
enum class Element : int {
    float32 = 0,
    float64 = 1,
    bfloat16 = 2,
    float16 = 3,
    uint8 = 4,
    int8 = 5,
    int16 = 6,
    int32 = 7,
    int64 = 8,
};

// A row is `runs` runs of `length` adjacent elements. Strides are in elements.
struct RunsShape {
    std::int64_t samples;
    std::int64_t runs;
    std::int64_t length;
    std::int64_t sample_stride;
    std::int64_t run_stride;
};

namespace DPKERNELS_DEVICE {

// See the contract in dpkernels/ops/fingerprints. Every element of bits and moments is written, in
// an order of additions that does not depend on the number of threads.
void fingerprint(const void* rows,  // [samples, runs, length]
                 Element type,
                 std::uint64_t* bits,  // [samples, 2]
                 double* moments,      // [samples, 3]
                 const RunsShape& shape, Launch launch);

}  // namespace DPKERNELS_DEVICE
}  // namespace dpkernels
