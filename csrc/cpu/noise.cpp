#include "dpkernels/noise.h"

#include "cpu/elements.h"
#include "cpu/normals.h"
#include "cpu/parallel.h"

namespace dpkernels::cpu {

namespace {

template <class T, class Wide>
void add_noise(T* tensor,  // [numel]
               std::int64_t numel, Wide noise_std, const Key& key, std::uint64_t block,
               int threads) {
    for_chunks(numel, threads, [=](std::int64_t begin, std::int64_t end) {
        Wide z[kChunk];
        normals(z, end - begin, key, block + static_cast<std::uint64_t>(begin / kPerBlock));
        for (std::int64_t i = begin; i < end; ++i) {
            tensor[i] = narrow<T>(widen(tensor[i]) + noise_std * z[i - begin]);
        }
    });
}

template <class T>
void normals_of_words(T* z,                        // [blocks, 8]
                      const std::uint32_t* words,  // [blocks, 16]
                      std::int64_t blocks, int threads) {
    for_chunks(blocks, threads, [=](std::int64_t begin, std::int64_t end) {
        for (std::int64_t first = begin; first < end; first += kLanes) {
            const int lanes = static_cast<int>(std::min<std::int64_t>(kLanes, end - first));
            Words x[16] = {};
            for (int lane = 0; lane < lanes; ++lane) {
                for (int i = 0; i < 16; ++i) x[i][lane] = words[16 * (first + lane) + i];
            }
            T group[kPerGroup];
            normals_of(x, group);
            std::copy_n(group, kPerBlock * lanes, z + kPerBlock * first);
        }
    });
}

}  // namespace

void standard_normals(void* z, DType type, const std::uint32_t* words, std::int64_t blocks,
                      Launch launch) {
    if (type == DType::float64) {
        normals_of_words(static_cast<double*>(z), words, blocks, launch.threads);
    } else {
        normals_of_words(static_cast<float*>(z), words, blocks, launch.threads);
    }
}

void chacha20_blocks(std::uint32_t* words, std::int64_t blocks, Key key, std::uint64_t counter,
                     std::uint64_t nonce, Launch launch) {
    for_chunks(blocks, launch.threads, [=](std::int64_t begin, std::int64_t end) {
        for (std::int64_t first = begin; first < end; first += kLanes) {
            Words x[16];
            chacha20_lanes(x, key, counter + static_cast<std::uint64_t>(first), nonce);
            const int lanes = static_cast<int>(std::min<std::int64_t>(kLanes, end - first));
            for (int lane = 0; lane < lanes; ++lane) {
                for (int i = 0; i < 16; ++i) words[16 * (first + lane) + i] = x[i][lane];
            }
        }
    });
}

void gaussian_noise(void* tensor, DType type, std::int64_t numel, double noise_std, Key key,
                    std::uint64_t block, Launch launch) {
    with_type(type, [=](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        using Wide = decltype(widen(*tag));
        add_noise(static_cast<T*>(tensor), numel, static_cast<Wide>(noise_std), key, block,
                  launch.threads);
    });
}

}  // namespace dpkernels::cpu
