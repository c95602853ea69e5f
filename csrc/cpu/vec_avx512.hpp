// AVX-512 (F, BW, DQ, VL). Partial loads and stores, and max, are as in vec_avx2.hpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../rules/inline.hpp"
#include "natural_order.hpp"

namespace fusedstep::avx512 {

struct U32;

struct F32 {
    using Element = float;
    using Bits = U32;
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
    FUSEDSTEP_INLINE friend F32 min(F32 a, F32 b) { return _mm512_min_ps(a.x, b.x); }
    // Exact, as vsqrtps is, whose unit it leaves to the division that a rule needs too: from any start within 2^-14 of
    // 1 / sqrt(a), which vrsqrt14ps gives, this is the correctly rounded root. Outside [2^-96, infinity), where its
    // last remainder would not be exact, vsqrtps is what does it.
    FUSEDSTEP_INLINE friend F32 sqrt(F32 a) {
        const __m512i above = _mm512_sub_epi32(_mm512_castps_si512(a.x), _mm512_set1_epi32(0x0F800000));
        if (_mm512_cmpge_epu32_mask(above, _mm512_set1_epi32(0x7F800000 - 0x0F800000)) != 0) [[unlikely]]
            return _mm512_sqrt_ps(a.x);
        const __m512 half = _mm512_set1_ps(0.5f);
        const __m512 y = _mm512_rsqrt14_ps(a.x);
        const __m512 g = _mm512_mul_ps(a.x, y);
        const __m512 h = _mm512_mul_ps(y, half);
        const __m512 r = _mm512_fnmadd_ps(g, h, half);
        const __m512 root = _mm512_fmadd_ps(g, r, g);
        return _mm512_fmadd_ps(_mm512_fmadd_ps(h, r, h), _mm512_fnmadd_ps(root, root, a.x), root);
    }
    FUSEDSTEP_INLINE friend F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a.x, b.x, c.x); }
    FUSEDSTEP_INLINE friend F32 fms(F32 a, F32 b, F32 c) { return _mm512_fmsub_ps(a.x, b.x, c.x); }
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
    FUSEDSTEP_INLINE static F64 load(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
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

struct U32 {
    __m512i x;

    FUSEDSTEP_INLINE U32() : x(_mm512_setzero_si512()) {}
    FUSEDSTEP_INLINE explicit U32(uint32_t value) : x(_mm512_set1_epi32(static_cast<int>(value))) {}
    FUSEDSTEP_INLINE U32(__m512i value) : x(value) {}

    FUSEDSTEP_INLINE static U32 load(const uint32_t* from) { return _mm512_loadu_si512(from); }
    FUSEDSTEP_INLINE static U32 load(const uint16_t* from) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    FUSEDSTEP_INLINE static U32 load(const int16_t* from) {
        return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    FUSEDSTEP_INLINE static U32 load(const uint8_t* from) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    FUSEDSTEP_INLINE static U32 load(const int8_t* from) {
        return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    FUSEDSTEP_INLINE void store(uint32_t* to) const { _mm512_storeu_si512(to, x); }
    // Four vectors, each lane of which fits an item.
    FUSEDSTEP_INLINE static void store(uint32_t* to, const U32 (&from)[4]) {
        for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + 16 * i, from[i].x);
    }
    FUSEDSTEP_INLINE static void store(uint16_t* to, const U32 (&from)[4]) {
        for (int i = 0; i < 4; ++i) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * i), _mm512_cvtepi32_epi16(from[i].x));
        }
    }
    FUSEDSTEP_INLINE static void store(int8_t* to, const U32 (&from)[4]) {
        store(reinterpret_cast<uint8_t*>(to), from);
    }
    FUSEDSTEP_INLINE static void store(uint8_t* to, const U32 (&from)[4]) {
        for (int i = 0; i < 4; ++i) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * i), _mm512_cvtepi32_epi8(from[i].x));
        }
    }
    FUSEDSTEP_INLINE static U32 lane_numbers() {
        return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    }
    FUSEDSTEP_INLINE U32 greatest() const {
        __m512i m = _mm512_max_epu32(x, _mm512_shuffle_i32x4(x, x, 0b01001110));
        m = _mm512_max_epu32(m, _mm512_shuffle_i32x4(m, m, 0b10110001));
        m = _mm512_max_epu32(m, _mm512_shuffle_epi32(m, _MM_PERM_BADC));
        return _mm512_max_epu32(m, _mm512_shuffle_epi32(m, _MM_PERM_CDAB));
    }
    FUSEDSTEP_INLINE uint32_t first() const {
        return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(x)));
    }

    FUSEDSTEP_INLINE friend U32 operator+(U32 a, U32 b) { return _mm512_add_epi32(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 operator-(U32 a, U32 b) { return _mm512_sub_epi32(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 operator*(U32 a, U32 b) { return _mm512_mullo_epi32(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 operator&(U32 a, U32 b) { return _mm512_and_si512(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 operator|(U32 a, U32 b) { return _mm512_or_si512(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 operator^(U32 a, U32 b) { return _mm512_xor_si512(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 operator<<(U32 a, int n) { return _mm512_slli_epi32(a.x, n); }
    FUSEDSTEP_INLINE friend U32 operator>>(U32 a, int n) { return _mm512_srli_epi32(a.x, n); }
    FUSEDSTEP_INLINE friend U32 max(U32 a, U32 b) { return _mm512_max_epu32(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 min(U32 a, U32 b) { return _mm512_min_epu32(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 if_greater(U32 a, U32 b, U32 yes, U32 no) {
        return _mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(a.x, b.x), no.x, yes.x);
    }
    FUSEDSTEP_INLINE friend U32 absolute(U32 a) { return _mm512_abs_epi32(a.x); }
    FUSEDSTEP_INLINE friend U32 with_sign(U32 a, U32 of) {
        return _mm512_mask_sub_epi32(a.x, _mm512_movepi32_mask(of.x), _mm512_setzero_si512(), a.x);
    }
};

FUSEDSTEP_INLINE F32 if_negative(U32 a, F32 yes, F32 no) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(a.x), no.x, yes.x);
}

FUSEDSTEP_INLINE bool any_nan(const F32 (&values)[4]) {
    return (_mm512_cmp_ps_mask(values[0].x, values[1].x, _CMP_UNORD_Q) |
            _mm512_cmp_ps_mask(values[2].x, values[3].x, _CMP_UNORD_Q)) != 0;
}

FUSEDSTEP_INLINE U32 bits_of(F32 value) { return _mm512_castps_si512(value.x); }
FUSEDSTEP_INLINE F32 from_bits(U32 bits) { return _mm512_castsi512_ps(bits.x); }

// In which items of 8 and 16 bits are read and written with the fewest instructions.
using OrderOfWords = Natural<F32>;

}  // namespace fusedstep::avx512
