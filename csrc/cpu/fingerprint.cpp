#include "dpkernels/fingerprint.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/elements.h"
#include "cpu/parallel.h"

namespace dpkernels::cpu {

namespace {

using std::int64_t;
using std::uint32_t;
using std::uint64_t;

// A thread works on so many blocks of kBlock elements at a time.
constexpr int64_t kChunkBlocks = 64;

// dpkernels/ops/fingerprints/multipliers.py has the same numbers.
constexpr uint32_t kInBlock[2] = {0x9e3779b9u, 0xc2b2ae35u};
constexpr uint32_t kOfBlock[2] = {0x27d4eb2fu, 0x165667b1u};

// The finalizer of MurmurHash3.
uint32_t mixed(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

// What the elements of every block are multiplied by.
struct Multipliers {
    // For each sum, of an element's low 32 bits, then of its high ones.
    alignas(64) uint32_t words[2][2 * kBlock];
    alignas(64) double signs[2 * kBlock];  // a block's begin at a place of its own

    Multipliers() {
        for (int sum = 0; sum < 2; ++sum) {
            for (uint32_t at = 0; at < 2 * kBlock; ++at) {
                words[sum][at] = mixed(at ^ kInBlock[sum]) | 1u;
            }
        }
        for (int64_t at = 0; at < 2 * kBlock; ++at) {
            signs[at] = words[0][at] >> 31 ? -1.0 : 1.0;
        }
    }
};

const Multipliers& multipliers() {
    static const Multipliers all;
    return all;
}

struct Sums {
    uint64_t bits[2] = {};
    double moments[3] = {};
};

template <class T>
using Word = std::conditional_t<
    sizeof(T) == 8, uint64_t,
    std::conditional_t<sizeof(T) == 4, uint32_t,
                       std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint8_t>>>;

// What holds every element of type T exactly.
template <class T>
using Exact = std::conditional_t<sizeof(T) <= 2 || std::is_same_v<T, float>, float, double>;

template <class T>
DPK_INLINE Exact<T> exact(T x) {
    if constexpr (std::is_arithmetic_v<T>) {
        return static_cast<Exact<T>>(x);
    } else {
        return widen(x);
    }
}

// The bits of one block, each word times its multiplier.
template <class T>
DPK_INLINE void add_bits(const T* block,  // [count]
                         int64_t count, const Multipliers& by, uint64_t (&bits)[2]) {
    uint64_t first = 0, second = 0;
    for (int64_t i = 0; i < count; ++i) {
        const auto word = bits_as<Word<T>>(block[i]);
        const auto low = static_cast<uint32_t>(word);
        first += static_cast<uint64_t>(low) * by.words[0][i];
        second += static_cast<uint64_t>(low) * by.words[1][i];
        if constexpr (sizeof(T) == 8) {
            const auto high = static_cast<uint32_t>(word >> 32);
            first += static_cast<uint64_t>(high) * by.words[0][kBlock + i];
            second += static_cast<uint64_t>(high) * by.words[1][kBlock + i];
        }
    }
    bits[0] = first;
    bits[1] = second;
}

using Doubles = Lanes<double>::Vector;
constexpr int64_t kDoubles = Lanes<double>::count;

DPK_INLINE Doubles load_doubles(const double* address) {
    return *reinterpret_cast<const Lanes<double>::Unaligned*>(address);
}

DPK_INLINE Doubles load_doubles(const float* address) {
    typedef float Half __attribute__((vector_size(2 * kLanes), aligned(alignof(float)), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Half*>(address), Doubles);
}

template <class Wide>
DPK_INLINE void add_moments(const Wide* values,   // [count]
                            const double* signs,  // [count]
                            int64_t count, double (&moments)[3]) {
    Doubles sum[4] = {}, squares[4] = {}, signed_sum[4] = {};
    const auto add_vector = [&](int64_t at, int part) {
        const Doubles x = load_doubles(values + at);
        sum[part] += x;
        squares[part] += x * x;
        signed_sum[part] += x * load_doubles(signs + at);
    };
    int64_t i = 0;
    for (; i + 4 * kDoubles <= count; i += 4 * kDoubles) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) add_vector(i + part * kDoubles, part);
        // Fetches the next block, which as a rule lies behind this one: memory would else be idle.
        for (int64_t line = 0; line < 4 * kDoubles; line += 64 / int64_t{sizeof(Wide)}) {
            __builtin_prefetch(values + i + line + kBlock);
        }
    }
    for (; i + kDoubles <= count; i += kDoubles) add_vector(i, 0);
    double rest[3] = {};
    for (; i < count; ++i) {
        const auto x = static_cast<double>(values[i]);
        rest[0] += x;
        rest[1] += x * x;
        rest[2] += x * signs[i];
    }
    moments[0] = sum_lanes<double>(sum) + rest[0];
    moments[1] = sum_lanes<double>(squares) + rest[1];
    moments[2] = sum_lanes<double>(signed_sum) + rest[2];
}

// The elements [begin, begin + count) of a row: where they lie, or a copy in `buffer`.
template <class T>
const T* adjacent(const T* row, int64_t begin, int64_t count, const RunsShape& shape, T* buffer) {
    int64_t run = begin / shape.length, at = begin % shape.length;
    if (at + count <= shape.length) return row + run * shape.run_stride + at;
    if (shape.length == 1) {
        for (int64_t i = 0; i < count; ++i) buffer[i] = row[(begin + i) * shape.run_stride];
        return buffer;
    }
    for (int64_t done = 0; done < count; ++run, at = 0) {
        const int64_t size = std::min(count - done, shape.length - at);
        std::copy_n(row + run * shape.run_stride + at, size, buffer + done);
        done += size;
    }
    return buffer;
}

// Of the elements [begin, end) of a row; `begin` is a multiple of kBlock.
template <class T>
Sums sums_of(const T* row, int64_t begin, int64_t end, const RunsShape& shape,
             const Multipliers& by) {
    alignas(64) T buffer[kBlock];
    alignas(64) Exact<T> wide[kBlock];
    Sums total;
    for (; begin < end; begin += kBlock) {
        const int64_t count = std::min(kBlock, end - begin);
        const T* block = adjacent(row, begin, count, shape, buffer);
        const auto place = static_cast<uint32_t>(begin / kBlock);
        const uint32_t numbers[2] = {mixed(place ^ kOfBlock[0]) | 1u,
                                     mixed(place ^ kOfBlock[1]) | 1u};
        const double* signs = by.signs + 8 * (numbers[0] >> 25);
        Sums sums;
        add_bits(block, count, by, sums.bits);
        if constexpr (std::is_same_v<T, Exact<T>>) {
            add_moments(block, signs, count, sums.moments);
        } else {
            for (int64_t i = 0; i < count; ++i) wide[i] = exact(block[i]);
            add_moments(wide, signs, count, sums.moments);
        }
        for (int i = 0; i < 2; ++i) total.bits[i] += sums.bits[i] * numbers[i];
        for (int i = 0; i < 3; ++i) total.moments[i] += sums.moments[i];
    }
    return total;
}

template <class T>
void fingerprint_of(const T* rows, uint64_t* bits, double* moments, const RunsShape& shape,
                    Launch launch) {
    const Multipliers& by = multipliers();
    const int64_t size = shape.runs * shape.length, step = kChunkBlocks * kBlock;
    const int64_t chunks = std::max<int64_t>(1, (size + step - 1) / step);
    const int64_t jobs = shape.samples * chunks;
    std::vector<Sums> parts(static_cast<std::size_t>(jobs));
#pragma omp parallel for num_threads(team_for(shape.samples* size, launch)) schedule(static)
    for (int64_t job = 0; job < jobs; ++job) {
        const int64_t begin = job % chunks * step;
        parts[static_cast<std::size_t>(job)] =
            sums_of(rows + job / chunks * shape.sample_stride, begin, std::min(size, begin + step),
                    shape, by);
    }
    std::fill_n(bits, 2 * shape.samples, 0);
    std::fill_n(moments, 3 * shape.samples, 0.0);
    for (int64_t job = 0; job < jobs; ++job) {
        const Sums& part = parts[static_cast<std::size_t>(job)];
        const int64_t sample = job / chunks;
        for (int i = 0; i < 2; ++i) bits[2 * sample + i] += part.bits[i];
        for (int i = 0; i < 3; ++i) moments[3 * sample + i] += part.moments[i];
    }
}

}  // namespace

void fingerprint(const void* rows, Element type, uint64_t* bits, double* moments,
                 const RunsShape& shape, Launch launch) {
    const auto run = [&](auto element) {
        fingerprint_of(static_cast<const decltype(element)*>(rows), bits, moments, shape, launch);
    };
    switch (type) {
        case Element::float32: return run(float{});
        case Element::float64: return run(double{});
        case Element::bfloat16: return run(BFloat16{});
        case Element::float16: return run(Float16{});
        case Element::uint8: return run(std::uint8_t{});
        case Element::int8: return run(std::int8_t{});
        case Element::int16: return run(std::int16_t{});
        case Element::int32: return run(std::int32_t{});
        case Element::int64: return run(std::int64_t{});
    }
}

}  // namespace dpkernels::cpu
