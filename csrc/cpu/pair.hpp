// Two numbers, in the lower lanes of a register: what AVX2 and AVX-512 compute once for a block of two streams.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../rules/inline.hpp"

namespace fusedstep {

struct Pair {
    __m128 x;

    FUSEDSTEP_INLINE Pair(__m128 value) : x(value) {}
    FUSEDSTEP_INLINE explicit Pair(float both) : x(_mm_set1_ps(both)) {}
    // The upper lanes are divided by, too.
    FUSEDSTEP_INLINE Pair(float first, float second) : x(_mm_setr_ps(first, second, first, second)) {}

    FUSEDSTEP_INLINE uint32_t first_bits() const { return static_cast<uint32_t>(bits()); }
    FUSEDSTEP_INLINE uint32_t second_bits() const { return static_cast<uint32_t>(bits() >> 32); }

    FUSEDSTEP_INLINE friend Pair operator*(Pair a, Pair b) { return _mm_mul_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend Pair operator/(Pair a, Pair b) { return _mm_div_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend Pair max(Pair a, Pair b) { return _mm_max_ps(a.x, b.x); }

private:
    FUSEDSTEP_INLINE uint64_t bits() const { return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_castps_si128(x))); }
};

}  // namespace fusedstep
