// How Python values reach the kernels. Everything is plain data: addresses and element types as
// integers, keys as 32 bytes, the launch as a tuple; wrong shapes of these are a TypeError.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string_view>

#include "dpkernels/types.h"

namespace dpkernels {

// `tensor.data_ptr()`, as whatever pointer the kernel wants.
struct Pointer {
    std::uintptr_t address = 0;

    template <class T>
    operator T*() const {
        return reinterpret_cast<T*>(address);
    }
};

}  // namespace dpkernels

namespace pybind11::detail {

template <>
struct type_caster<dpkernels::Pointer> {
    PYBIND11_TYPE_CASTER(dpkernels::Pointer, const_name("address"));

    bool load(handle source, bool) {
        make_caster<std::uintptr_t> number;
        if (!number.load(source, false)) return false;
        value.address = cast_op<std::uintptr_t>(number);
        return true;
    }
};

template <>
struct type_caster<dpkernels::DType> {
    PYBIND11_TYPE_CASTER(dpkernels::DType, const_name("dtype"));

    bool load(handle source, bool) {
        make_caster<int> number;
        if (!number.load(source, false)) return false;
        const int code = cast_op<int>(number);
        value = static_cast<dpkernels::DType>(code);
        return code >= 0 && code <= 3;
    }
};

// Little-endian words, as RFC 8439 reads its key.
template <>
struct type_caster<dpkernels::Key> {
    PYBIND11_TYPE_CASTER(dpkernels::Key, const_name("key"));

    bool load(handle source, bool) {
        if (!isinstance<bytes>(source)) return false;
        const std::string_view key = reinterpret_borrow<bytes>(source);
        if (key.size() != 32) return false;
        for (std::size_t i = 0; i < 32; ++i) {
            const std::uint32_t byte = static_cast<unsigned char>(key[i]);
            value.words[i / 4] |= byte << (8 * (i % 4));
        }
        return true;
    }
};

// (threads, device, stream)
template <>
struct type_caster<dpkernels::Launch> {
    PYBIND11_TYPE_CASTER(dpkernels::Launch, const_name("launch"));

    bool load(handle source, bool) {
        if (!isinstance<tuple>(source)) return false;
        const auto launch = reinterpret_borrow<tuple>(source);
        if (launch.size() != 3) return false;
        value.threads = launch[0].cast<int>();
        value.device = launch[1].cast<int>();
        value.stream = reinterpret_cast<void*>(launch[2].cast<std::uintptr_t>());
        return true;
    }
};

}  // namespace pybind11::detail

namespace dpkernels {

namespace py = pybind11;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

namespace DPKERNELS_DEVICE {

// One per op family; cpu_module.cpp and cuda_module.cpp call those that their device has.
void register_affine(py::module_& m);
void register_clip(py::module_& m);
void register_conv(py::module_& m);
void register_embedding(py::module_& m);
void register_linear(py::module_& m);
void register_noise(py::module_& m);
void register_recurrence(py::module_& m);
void register_small_conv(py::module_& m);

}  // namespace DPKERNELS_DEVICE
}  // namespace dpkernels
