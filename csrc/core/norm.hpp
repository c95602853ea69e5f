// The fixed tree in which the squares of all gradients of a call are added, so that the sum is the same bits
// whatever runs it. Each gradient is cut into blocks in the order in which its parameter is walked. In a block,
// element i is squared and added to lane i % 32, in float64, by fma; then the lanes are added in pairs, the
// blocks of a gradient in pairs, and the gradients in pairs. Empty gradients are left out.
#pragma once

#include <cstdint>

#include "../rules/inline.hpp"

namespace fusedstep {

constexpr int64_t norm_block = 4096;
constexpr int norm_lanes = 32;

// Adds neighbours until one is left, as if zeros made the count a power of two. Overwrites the values.
FUSEDSTEP_INLINE double sum_in_pairs(double* values, int64_t count) {
    if (count == 0) return 0.0;
    for (; count > 1; count = (count + 1) / 2) {
        for (int64_t i = 0; i < count / 2; ++i) values[i] = values[2 * i] + values[2 * i + 1];
        if (count % 2 != 0) values[count / 2] = values[count - 1];
    }
    return values[0];
}

}  // namespace fusedstep
