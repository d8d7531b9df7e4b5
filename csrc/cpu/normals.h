// Standard normals of consecutive ChaCha20 blocks, eight per block.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/chacha20.h"
#include "common/gaussian.h"
#include "cpu/simd.h"

namespace dpkernels::cpu {

constexpr int kPerBlock = 8;
constexpr int kPerGroup = kPerBlock * kLanes;  // normals made at once, one block per lane

inline void chacha20_lanes(Words (&x)[16], const Key& key, std::uint64_t counter,
                           std::uint64_t nonce) {
    const Words low = lane_index() + static_cast<std::uint32_t>(counter);
    const Words carry = bits_as<Words>(low < static_cast<std::uint32_t>(counter));  // 0 or -1
    const Words high = Words{} + static_cast<std::uint32_t>(counter >> 32) - carry;
    chacha20_block(x, key, low, high, nonce);
}

// One block per lane becomes eight normals per lane, block after block.
inline void normals_of(const Words (&x)[16],
                       float* z) {  // [kPerGroup]
    Floats lanes[kPerBlock];
    for (int j = 0; j < 4; ++j) {
        gaussian_pair<Ints>(x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3], lanes[2 * j],
                            lanes[2 * j + 1]);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < kPerBlock; ++i) z[kPerBlock * lane + i] = lanes[i][lane];
    }
}

inline void normals_of(const Words (&x)[16],
                       double* z) {  // [kPerGroup]
    for (int lane = 0; lane < kLanes; ++lane) {
        double* block = z + kPerBlock * lane;
        for (int j = 0; j < 4; ++j) {
            gaussian_pair(x[4 * j][lane], x[4 * j + 1][lane], x[4 * j + 2][lane],
                          x[4 * j + 3][lane], block[2 * j], block[2 * j + 1]);
        }
    }
}

template <class T>
void normals_group(T* z,  // [kPerGroup]
                   const Key& key, std::uint64_t counter) {
    Words x[16];
    chacha20_lanes(x, key, counter, 0);
    normals_of(x, z);
}

// The first `count` normals from block `counter` on.
template <class T>
void normals(T* z,  // [count]
             std::int64_t count, const Key& key, std::uint64_t counter) {
    std::int64_t done = 0;
    for (; done + kPerGroup <= count; done += kPerGroup, counter += kLanes) {
        normals_group(z + done, key, counter);
    }
    if (done < count) {
        T rest[kPerGroup];
        normals_group(rest, key, counter);
        std::memcpy(z + done, rest, sizeof(T) * static_cast<std::size_t>(count - done));
    }
}

}  // namespace dpkernels::cpu
