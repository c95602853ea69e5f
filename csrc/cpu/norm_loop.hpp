// The loop over memory that adds squares to the lanes of a block; core/norm.hpp says in which order. A float32
// is exact in float64, and so is its square.
#pragma once

#include <cstdint>

#include "../core/norm.hpp"
#include "fetch_ahead.hpp"
#include "kernels.hpp"

namespace fusedstep {

// V is a vector of float64, T the type in memory.
template <class V, class T>
FUSEDSTEP_INLINE void add_squares_of_lanes(V (&sums)[norm_lanes / V::lanes], const T* from) {
#pragma GCC unroll 32
    for (int u = 0; u < norm_lanes / V::lanes; ++u) {
        const V x = V::load(from + u * V::lanes);
        sums[u] = fma(x, x, sums[u]);
    }
}

// Only the last part of a block may have a count that is no multiple of the lanes.
template <class V, class T>
FUSEDSTEP_INLINE void add_squares_of_part(const T* from, int64_t count, double* lanes) {
    V sums[norm_lanes / V::lanes];
    for (int u = 0; u < norm_lanes / V::lanes; ++u) sums[u] = V::load(lanes + u * V::lanes);
    for (; count >= norm_lanes; count -= norm_lanes, from += norm_lanes) add_squares_of_lanes<V>(sums, from);
    if (count > 0) {
        T padded[norm_lanes] = {};
        for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
        add_squares_of_lanes<V>(sums, padded);
    }
    for (int u = 0; u < norm_lanes / V::lanes; ++u) sums[u].store(lanes + u * V::lanes);
}

template <class V, class T>
void add_squares_loop(const void* values, int64_t count, double* lanes) {
    add_squares_of_part<V>(static_cast<const T*>(values), count, lanes);
}

// Whole blocks, a few lines of each in turn.
template <class V, class T>
void add_squares_side_by_side(const void* values, double* lanes) {
    constexpr int64_t at_once = 4 * norm_lanes;
    const T* const from = static_cast<const T*>(values);
    for (int64_t at = 0; at < norm_block; at += at_once) {
        for (int k = 0; k < blocks_side_by_side; ++k) {
            fetch_ahead<at_once>(from + k * norm_block + at);
            add_squares_of_part<V>(from + k * norm_block + at, at_once, lanes + k * norm_lanes);
        }
    }
}

}  // namespace fusedstep
