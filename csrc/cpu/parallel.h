// How work is divided among threads: statically, and the result never depends on their number.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "dpkernels/types.h"

namespace dpkernels::cpu {

// Elements below which a second thread costs more than it brings.
constexpr std::int64_t kParallelElements = 1 << 16;

inline int team_for(std::int64_t elements, Launch launch) {
    return elements < kParallelElements ? 1 : launch.threads;
}

// Elements a thread works on at a time: small enough for L1, a multiple of any kPerGroup.
constexpr std::int64_t kChunk = 2048;

// Calls f(which, begin, end) for every chunk of [0, sizes[which]) of every range; chunks start at
// multiples of kChunk.
template <class Function>
void for_chunks_of(const std::vector<std::int64_t>& sizes, int threads, Function&& f) {
    std::vector<std::int64_t> firsts = {0};  // of each range, among all chunks
    for (const std::int64_t size : sizes) {
        firsts.push_back(firsts.back() + (size + kChunk - 1) / kChunk);
    }
    const std::int64_t chunks = firsts.back();
    const auto run = [&](std::int64_t chunk) {
        const auto after = std::upper_bound(firsts.begin(), firsts.end(), chunk);
        const auto which = static_cast<std::size_t>(after - firsts.begin() - 1);
        const std::int64_t begin = (chunk - firsts[which]) * kChunk;
        f(which, begin, std::min(sizes[which], begin + kChunk));
    };
    const int team = static_cast<int>(std::min<std::int64_t>(threads, chunks));
    if (team <= 1) {
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) run(chunk);
        return;
    }
#pragma omp parallel for num_threads(team) schedule(static)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) run(chunk);
}

// Calls f(begin, end) for every chunk of [0, numel).
template <class Function>
void for_chunks(std::int64_t numel, int threads, Function&& f) {
    for_chunks_of({numel}, threads,
                  [&](std::size_t, std::int64_t begin, std::int64_t end) { f(begin, end); });
}

}  // namespace dpkernels::cpu
