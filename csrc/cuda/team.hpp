// Threads with consecutive numbers that exchange values: on a GPU those of a warp. On the host, where tests run the
// threads of a grid one after the other, each works alone and does the part of all.
#pragma once

#include <cstdint>

#include "../core/norm.hpp"
#include "../rules/inline.hpp"
#include "unroll.hpp"

namespace fusedstep::cuda {

#if defined(__CUDACC__)
// All threads of a warp call these together.
struct Warp {
    static constexpr int threads = 32;

    // What the thread whose number differs in the bit `distance` has.
    template <class Value>
    __device__ __forceinline__ Value exchange(Value value, int distance) const {
        return __shfl_xor_sync(0xFFFFFFFFu, value, distance);
    }

    // What the next thread has among `count` of them, a power of two; the last gets what the first has.
    template <int count, class Value>
    __device__ __forceinline__ Value next(Value value) const {
        return __shfl_sync(0xFFFFFFFFu, value, threadIdx.x + 1, count);
    }

    // Returns when all threads of the block are here; what they wrote before is seen by all then.
    __device__ __forceinline__ void wait_for_block() const { __syncthreads(); }
};
#endif

struct Alone {
    static constexpr int threads = 1;

    template <class Value>
    FUSEDSTEP_INLINE Value exchange(Value value, int) const {
        return value;
    }
    template <int count, class Value>
    FUSEDSTEP_INLINE Value next(Value value) const {
        return value;
    }
    FUSEDSTEP_INLINE void wait_for_block() const {}
};

// The greatest value of `count` threads, a power of two.
template <int count, class Team>
FUSEDSTEP_INLINE uint32_t greatest_of(const Team& team, uint32_t value) {
    FUSEDSTEP_UNROLL
    for (int distance = count / 2; distance > 0; distance /= 2) {
        const uint32_t other = team.exchange(value, distance);
        value = other > value ? other : value;
    }
    return value;
}

// The sum of the lanes of a block of the norm, of which each of `threads` has neighbours: in pairs, as core/norm.hpp
// adds them. A sum of two has the same bits in either order. Overwrites the lanes.
template <int threads, class Team>
FUSEDSTEP_INLINE double sum_of_lanes(const Team& team, double (&lanes)[norm_lanes / threads]) {
    FUSEDSTEP_UNROLL
    for (int distance = 1; distance < norm_lanes / threads; distance *= 2) {
        FUSEDSTEP_UNROLL
        for (int i = 0; i < norm_lanes / threads; i += 2 * distance) lanes[i] += lanes[i + distance];
    }
    double sum = lanes[0];
    FUSEDSTEP_UNROLL
    for (int distance = 1; distance < threads; distance *= 2) sum += team.exchange(sum, distance);
    return sum;
}

}  // namespace fusedstep::cuda
