// How Python values reach the kernels. Everything is plain data: addresses and element types as
// integers, keys as 32 bytes, structs as the tuples of their members; wrong shapes of these are a
// TypeError.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "dpkernels/affine.h"
#include "dpkernels/clip.h"
#include "dpkernels/conv.h"
#include "dpkernels/embedding.h"
#include "dpkernels/fingerprint.h"
#include "dpkernels/linear.h"

namespace dpkernels {

namespace py = pybind11;

// `tensor.data_ptr()`, as whatever pointer the kernel wants.
struct Pointer {
    std::uintptr_t address = 0;

    template <class T>
    operator T*() const {
        return reinterpret_cast<T*>(address);
    }
};

// A struct without constructors, from the tuple of its members.
template <class Struct, class... Members>
struct TupleCaster {
    PYBIND11_TYPE_CASTER(Struct, py::detail::const_name("tuple"));

    bool load(py::handle source, bool convert) {
        using Tuple = std::tuple<Members...>;
        py::detail::make_caster<Tuple> members;
        if (!members.load(source, convert)) return false;
        value = std::apply([](const auto&... member) { return Struct{member...}; },
                           py::detail::cast_op<Tuple>(std::move(members)));
        return true;
    }
};

// An enumeration whose codes are 0 to `last`.
template <class Enum, Enum last>
struct EnumCaster {
    PYBIND11_TYPE_CASTER(Enum, py::detail::const_name("int"));

    bool load(py::handle source, bool) {
        py::detail::make_caster<int> number;
        if (!number.load(source, false)) return false;
        const int code = py::detail::cast_op<int>(number);
        value = static_cast<Enum>(code);
        return code >= 0 && code <= static_cast<int>(last);
    }
};

using Int = std::int64_t;
template <std::size_t count>
using Ints = std::array<Int, count>;

using LaunchCaster = TupleCaster<Launch, int, int, Pointer>;
using AffineCaster = TupleCaster<AffineShape, Int, Int, Int, Int, Ints<2>, Ints<2>, bool>;
using ConvCaster = TupleCaster<ConvGeometry, Int, Int, Int, Int, Ints<3>, Ints<3>, Ints<3>, Ints<3>,
                               Ints<3>, Ints<3>, Ints<5>, Ints<5>>;
using EmbeddingCaster = TupleCaster<EmbeddingShape, Int, Int, Int, Int, Ints<2>, Ints<2>>;
using RunsCaster = TupleCaster<RunsShape, Int, Int, Int, Int, Int>;
using FinishCaster = TupleCaster<DPKERNELS_DEVICE::Finish, Pointer, DType, Pointer, DType, Pointer,
                                 Int, Int, std::uint64_t, bool>;
using RowsCaster = TupleCaster<DPKERNELS_DEVICE::Rows, Pointer, Int, Int, Int>;

// Makes a kernel callable from Python, which passes its parameters in their order.
template <class... Parameters>
void define(py::module_& m, const char* name, void (*kernel)(Parameters...)) {
    m.def(
        name,
        [kernel](std::conditional_t<std::is_pointer_v<Parameters>, Pointer, Parameters>... values) {
            kernel(values...);
        },
        py::call_guard<py::gil_scoped_release>());
}

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
struct type_caster<dpkernels::DType>
    : dpkernels::EnumCaster<dpkernels::DType, dpkernels::DType::float16> {};
template <>
struct type_caster<dpkernels::Element>
    : dpkernels::EnumCaster<dpkernels::Element, dpkernels::Element::int64> {};

// Little-endian words, as RFC 8439 reads its key.
template <>
struct type_caster<dpkernels::Key> {
    PYBIND11_TYPE_CASTER(dpkernels::Key, const_name("key"));

    bool load(handle source, bool) {
        if (!isinstance<bytes>(source)) return false;
        const std::string_view key = reinterpret_borrow<bytes>(source);
        if (key.size() != 32) return false;
        value = {};
        for (std::size_t i = 0; i < 32; ++i) {
            const std::uint32_t byte = static_cast<unsigned char>(key[i]);
            value.words[i / 4] |= byte << (8 * (i % 4));
        }
        return true;
    }
};

template <>
struct type_caster<dpkernels::Launch> : dpkernels::LaunchCaster {};
template <>
struct type_caster<dpkernels::AffineShape> : dpkernels::AffineCaster {};
template <>
struct type_caster<dpkernels::ConvGeometry> : dpkernels::ConvCaster {};
template <>
struct type_caster<dpkernels::EmbeddingShape> : dpkernels::EmbeddingCaster {};
template <>
struct type_caster<dpkernels::RunsShape> : dpkernels::RunsCaster {};
template <>
struct type_caster<dpkernels::DPKERNELS_DEVICE::Finish> : dpkernels::FinishCaster {};
template <>
struct type_caster<dpkernels::DPKERNELS_DEVICE::Rows> : dpkernels::RowsCaster {};

}  // namespace pybind11::detail
