// Scratch of one thread, aligned to a line of the cache.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace dpkernels::cpu {

class AlignedBuffer {
public:
    float* at_least(std::int64_t floats) {
        if (floats > capacity_) {
            data_.reset(static_cast<float*>(::operator new(floats * sizeof(float), kAlignment)));
            capacity_ = floats;
        }
        return data_.get();
    }

private:
    static constexpr std::align_val_t kAlignment{64};
    struct Deleter {
        void operator()(float* pointer) const { ::operator delete(pointer, kAlignment); }
    };
    std::unique_ptr<float, Deleter> data_;
    std::int64_t capacity_ = 0;
};

}  // namespace dpkernels::cpu
