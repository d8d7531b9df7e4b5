// Static division of a flat range into chunks, one thread each; the result never depends on
// `threads`.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dpkernels::cpu {

// Elements a thread works on at a time: small enough for L1, a multiple of any kPerGroup.
constexpr std::int64_t kChunk = 2048;

// Calls f(begin, end) for every chunk of [0, numel); chunks start at multiples of kChunk.
template <class Function>
void for_chunks(std::int64_t numel, int threads, Function&& f) {
    const std::int64_t chunks = (numel + kChunk - 1) / kChunk;
    const int team = static_cast<int>(std::min<std::int64_t>(threads, chunks));
    if (team <= 1) {
        for (std::int64_t i = 0; i < chunks; ++i) {
            f(i * kChunk, std::min(numel, (i + 1) * kChunk));
        }
        return;
    }
#pragma omp parallel for num_threads(team) schedule(static)
    for (std::int64_t i = 0; i < chunks; ++i) f(i * kChunk, std::min(numel, (i + 1) * kChunk));
}

}  // namespace dpkernels::cpu
