// The table of element types: a new type is a line here and a vector type per instruction set.
#pragma once

#include <cstdint>

namespace fusedstep {

enum class DType : uint8_t { float32, float64 };

constexpr int dtype_count = 2;
constexpr int item_size(DType dtype) { return dtype == DType::float32 ? 4 : 8; }
constexpr const char* name(DType dtype) { return dtype == DType::float32 ? "float32" : "float64"; }

}  // namespace fusedstep
