// AVX2 + FMA. A partial load fills the other lanes with zeros; a partial store leaves memory past the
// count untouched. `max(a, b)` is `a > b ? a : b`, which is what vmaxps does: b when either is NaN.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../rules/inline.hpp"

namespace fusedstep::avx2 {

// The first n of eight 32-bit lanes: a window sliding over ones and then zeros.
alignas(32) static const int32_t lane_window[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

FUSEDSTEP_INLINE static __m256i first_lanes(int words) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane_window + 8 - words));
}

struct F32 {
    using Element = float;
    static constexpr int lanes = 8;

    __m256 x;

    FUSEDSTEP_INLINE F32() : x(_mm256_setzero_ps()) {}
    FUSEDSTEP_INLINE explicit F32(float value) : x(_mm256_set1_ps(value)) {}
    FUSEDSTEP_INLINE F32(__m256 value) : x(value) {}

    FUSEDSTEP_INLINE static F32 load(const float* from) { return _mm256_loadu_ps(from); }
    FUSEDSTEP_INLINE static F32 load(const float* from, int n) { return _mm256_maskload_ps(from, first_lanes(n)); }
    FUSEDSTEP_INLINE void store(float* to) const { _mm256_storeu_ps(to, x); }
    FUSEDSTEP_INLINE void store(float* to, int n) const { _mm256_maskstore_ps(to, first_lanes(n), x); }

    FUSEDSTEP_INLINE friend F32 operator+(F32 a, F32 b) { return _mm256_add_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 operator-(F32 a, F32 b) { return _mm256_sub_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 operator*(F32 a, F32 b) { return _mm256_mul_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 operator/(F32 a, F32 b) { return _mm256_div_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 max(F32 a, F32 b) { return _mm256_max_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 sqrt(F32 a) { return _mm256_sqrt_ps(a.x); }
    FUSEDSTEP_INLINE friend F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a.x, b.x, c.x); }
};

struct F64 {
    using Element = double;
    static constexpr int lanes = 4;

    __m256d x;

    FUSEDSTEP_INLINE F64() : x(_mm256_setzero_pd()) {}
    FUSEDSTEP_INLINE explicit F64(double value) : x(_mm256_set1_pd(value)) {}
    FUSEDSTEP_INLINE F64(__m256d value) : x(value) {}

    FUSEDSTEP_INLINE static F64 load(const double* from) { return _mm256_loadu_pd(from); }
    FUSEDSTEP_INLINE static F64 load(const double* from, int n) { return _mm256_maskload_pd(from, first_lanes(2 * n)); }
    FUSEDSTEP_INLINE void store(double* to) const { _mm256_storeu_pd(to, x); }
    FUSEDSTEP_INLINE void store(double* to, int n) const { _mm256_maskstore_pd(to, first_lanes(2 * n), x); }

    FUSEDSTEP_INLINE friend F64 operator+(F64 a, F64 b) { return _mm256_add_pd(a.x, b.x); }
    FUSEDSTEP_INLINE friend F64 operator-(F64 a, F64 b) { return _mm256_sub_pd(a.x, b.x); }
    FUSEDSTEP_INLINE friend F64 operator*(F64 a, F64 b) { return _mm256_mul_pd(a.x, b.x); }
    FUSEDSTEP_INLINE friend F64 operator/(F64 a, F64 b) { return _mm256_div_pd(a.x, b.x); }
    FUSEDSTEP_INLINE friend F64 max(F64 a, F64 b) { return _mm256_max_pd(a.x, b.x); }
    FUSEDSTEP_INLINE friend F64 sqrt(F64 a) { return _mm256_sqrt_pd(a.x); }
    FUSEDSTEP_INLINE friend F64 fma(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a.x, b.x, c.x); }
};

}  // namespace fusedstep::avx2
