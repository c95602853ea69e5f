// AVX-512 (F, BW, DQ, VL). Partial loads and stores, and max, are as in vec_avx2.hpp.
#pragma once

#include <immintrin.h>

#include "../rules/inline.hpp"

namespace fusedstep::avx512 {

struct F32 {
    using Element = float;
    static constexpr int lanes = 16;

    __m512 x;

    FUSEDSTEP_INLINE F32() : x(_mm512_setzero_ps()) {}
    FUSEDSTEP_INLINE explicit F32(float value) : x(_mm512_set1_ps(value)) {}
    FUSEDSTEP_INLINE F32(__m512 value) : x(value) {}

    FUSEDSTEP_INLINE static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
    FUSEDSTEP_INLINE static F32 load(const float* from) { return _mm512_loadu_ps(from); }
    FUSEDSTEP_INLINE static F32 load(const float* from, int n) { return _mm512_maskz_loadu_ps(first(n), from); }
    FUSEDSTEP_INLINE void store(float* to) const { _mm512_storeu_ps(to, x); }
    FUSEDSTEP_INLINE void store(float* to, int n) const { _mm512_mask_storeu_ps(to, first(n), x); }

    FUSEDSTEP_INLINE friend F32 operator+(F32 a, F32 b) { return _mm512_add_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 operator-(F32 a, F32 b) { return _mm512_sub_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 operator*(F32 a, F32 b) { return _mm512_mul_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 operator/(F32 a, F32 b) { return _mm512_div_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 max(F32 a, F32 b) { return _mm512_max_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 sqrt(F32 a) { return _mm512_sqrt_ps(a.x); }
    FUSEDSTEP_INLINE friend F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a.x, b.x, c.x); }
};

struct F64 {
    using Element = double;
    static constexpr int lanes = 8;

    __m512d x;

    FUSEDSTEP_INLINE F64() : x(_mm512_setzero_pd()) {}
    FUSEDSTEP_INLINE explicit F64(double value) : x(_mm512_set1_pd(value)) {}
    FUSEDSTEP_INLINE F64(__m512d value) : x(value) {}

    FUSEDSTEP_INLINE static __mmask8 first(int n) { return static_cast<__mmask8>((1u << n) - 1); }
    FUSEDSTEP_INLINE static F64 load(const double* from) { return _mm512_loadu_pd(from); }
    FUSEDSTEP_INLINE static F64 load(const double* from, int n) { return _mm512_maskz_loadu_pd(first(n), from); }
    FUSEDSTEP_INLINE void store(double* to) const { _mm512_storeu_pd(to, x); }
    FUSEDSTEP_INLINE void store(double* to, int n) const { _mm512_mask_storeu_pd(to, first(n), x); }

    FUSEDSTEP_INLINE friend F64 operator+(F64 a, F64 b) { return _mm512_add_pd(a.x, b.x); }
    FUSEDSTEP_INLINE friend F64 operator-(F64 a, F64 b) { return _mm512_sub_pd(a.x, b.x); }
    FUSEDSTEP_INLINE friend F64 operator*(F64 a, F64 b) { return _mm512_mul_pd(a.x, b.x); }
    FUSEDSTEP_INLINE friend F64 operator/(F64 a, F64 b) { return _mm512_div_pd(a.x, b.x); }
    FUSEDSTEP_INLINE friend F64 max(F64 a, F64 b) { return _mm512_max_pd(a.x, b.x); }
    FUSEDSTEP_INLINE friend F64 sqrt(F64 a) { return _mm512_sqrt_pd(a.x); }
    FUSEDSTEP_INLINE friend F64 fma(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a.x, b.x, c.x); }
};

}  // namespace fusedstep::avx512
