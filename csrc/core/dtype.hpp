// The table of element types of arrays. Rules compute in the first two; core/format.hpp says how the elements
// of a stream are stored in arrays of the others.
#pragma once

#include <cstdint>

namespace fusedstep {

enum class DType : uint8_t { float32, float64, bfloat16, float16, int8, uint8, uint16 };

constexpr int dtype_count = 2;  // that a rule computes in

constexpr int item_size(DType dtype) {
    constexpr int sizes[] = {4, 8, 2, 2, 1, 1, 2};
    return sizes[static_cast<int>(dtype)];
}

constexpr const char* name(DType dtype) {
    constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16", "int8", "uint8", "uint16"};
    return names[static_cast<int>(dtype)];
}

// What a step computes in for parameters of this type.
constexpr DType compute_type(DType parameter) { return parameter == DType::float64 ? DType::float64 : DType::float32; }

}  // namespace fusedstep
