// AVX-512 (F, BW, DQ, VL). Partial loads and stores, and max, are as in vec_avx2.hpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../rules/inline.hpp"
#include "bytes_of_lanes.hpp"
#include "order_of_words.hpp"
#include "pair.hpp"

namespace fusedstep::avx512 {

struct U32;

// Division and root occupy one unit, which is what limits a loop that computes little else. With an `own_root` roots
// are found beside it.
template <bool own_root>
struct BasicF32 {
    using Element = float;
    using Bits = U32;
    using OwnRoot = BasicF32<true>;
    static constexpr int lanes = 16;

    __m512 x;

    FUSEDSTEP_INLINE BasicF32() : x(_mm512_setzero_ps()) {}
    FUSEDSTEP_INLINE explicit BasicF32(float value) : x(_mm512_set1_ps(value)) {}
    FUSEDSTEP_INLINE BasicF32(__m512 value) : x(value) {}
    FUSEDSTEP_INLINE explicit BasicF32(BasicF32<!own_root> value) : x(value.x) {}

    FUSEDSTEP_INLINE static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
    FUSEDSTEP_INLINE static BasicF32 load(const float* from) { return _mm512_loadu_ps(from); }
    FUSEDSTEP_INLINE static BasicF32 load(const float* from, int n) { return _mm512_maskz_loadu_ps(first(n), from); }
    FUSEDSTEP_INLINE void store(float* to) const { _mm512_storeu_ps(to, x); }
    FUSEDSTEP_INLINE void store(float* to, int n) const { _mm512_mask_storeu_ps(to, first(n), x); }

    FUSEDSTEP_INLINE static BasicF32 first_of(Pair a) { return _mm512_broadcastss_ps(a.x); }
    FUSEDSTEP_INLINE static BasicF32 second_of(Pair a) {
        return _mm512_permutexvar_ps(_mm512_set1_epi32(1), _mm512_castps128_ps512(a.x));
    }

    FUSEDSTEP_INLINE friend BasicF32 operator+(BasicF32 a, BasicF32 b) { return _mm512_add_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend BasicF32 operator-(BasicF32 a, BasicF32 b) { return _mm512_sub_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend BasicF32 operator*(BasicF32 a, BasicF32 b) { return _mm512_mul_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend BasicF32 operator/(BasicF32 a, BasicF32 b) { return _mm512_div_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend BasicF32 max(BasicF32 a, BasicF32 b) { return _mm512_max_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend BasicF32 min(BasicF32 a, BasicF32 b) { return _mm512_min_ps(a.x, b.x); }
    // Exact either way: from any start within 2^-14 of 1 / sqrt(a), which vrsqrt14ps gives, this comes to the correctly
    // rounded root. Outside [2^-80, infinity), where its last remainder would be denormal or worse, vsqrtps is what
    // does it.
    FUSEDSTEP_INLINE friend BasicF32 sqrt(BasicF32 a) {
        if constexpr (!own_root) return _mm512_sqrt_ps(a.x);
        const __m512i above = _mm512_sub_epi32(_mm512_castps_si512(a.x), _mm512_set1_epi32(0x17800000));
        if (_mm512_cmpge_epu32_mask(above, _mm512_set1_epi32(0x7F800000 - 0x17800000)) != 0) [[unlikely]]
            return _mm512_sqrt_ps(a.x);
        const __m512 half = _mm512_set1_ps(0.5f);
        const __m512 y = _mm512_rsqrt14_ps(a.x);
        const __m512 g = _mm512_mul_ps(a.x, y);
        const __m512 h = _mm512_mul_ps(y, half);
        const __m512 r = _mm512_fnmadd_ps(g, h, half);
        const __m512 root = _mm512_fmadd_ps(g, r, g);
        return _mm512_fmadd_ps(_mm512_fmadd_ps(h, r, h), _mm512_fnmadd_ps(root, root, a.x), root);
    }
    FUSEDSTEP_INLINE friend BasicF32 fma(BasicF32 a, BasicF32 b, BasicF32 c) { return _mm512_fmadd_ps(a.x, b.x, c.x); }
    FUSEDSTEP_INLINE friend BasicF32 fms(BasicF32 a, BasicF32 b, BasicF32 c) { return _mm512_fmsub_ps(a.x, b.x, c.x); }
};

using F32 = BasicF32<false>;

struct F64 {
    using Element = double;
    using OwnRoot = F64;
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

FUSEDSTEP_INLINE __mmask16 denormal_lanes(F32 a) { return _mm512_fpclass_ps_mask(a.x, 0x20); }

FUSEDSTEP_INLINE bool any_denormal(F32 a, F32 b) {
    return _kortestz_mask16_u8(denormal_lanes(a), denormal_lanes(b)) == 0;
}

FUSEDSTEP_INLINE F32 without_denormals(F32 a) {
    return _mm512_mask_mov_ps(a.x, denormal_lanes(a), _mm512_setzero_ps());
}

FUSEDSTEP_INLINE bool all_zero(F32 a) { return _mm512_cmp_ps_mask(a.x, _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0; }

// Of their magnitudes. Nothing is true of a NaN.
FUSEDSTEP_INLINE bool all_at_least(F32 a, F32 least) {
    return _mm512_cmp_ps_mask(_mm512_abs_ps(a.x), _mm512_abs_ps(least.x), _CMP_NGE_UQ) == 0;
}

// As an integer, a denormal is its value times 2^149.
FUSEDSTEP_INLINE F32 sqrt_with_denormals(F32 a) {
    const __m512i bits = _mm512_castps_si512(a.x);
    const __mmask16 denormal = denormal_lanes(a) & ~_mm512_movepi32_mask(bits);
    const __m512 root = _mm512_sqrt_ps(_mm512_mask_cvtepi32_ps(a.x, denormal, _mm512_slli_epi32(bits, 1)));
    return _mm512_mask_mul_ps(root, denormal, root, _mm512_set1_ps(0x1p-75f));
}

// The halves of a vector in float64, and back.
FUSEDSTEP_INLINE F64 lower_half(F32 a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a.x)); }
FUSEDSTEP_INLINE F64 upper_half(F32 a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.x, 1)); }
FUSEDSTEP_INLINE F32 narrowed(F64 lower, F64 upper) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(lower.x)), _mm512_cvtpd_ps(upper.x), 1);
}

// a + b, and where that is not exact the odd one of its neighbours.
FUSEDSTEP_INLINE F64 sum_to_odd(F64 a, F64 b) {
    constexpr int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC, up = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
    const __m512i sum = _mm512_castpd_si512(_mm512_add_round_pd(a.x, b.x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
    const __mmask8 inexact =
        _mm512_cmp_pd_mask(_mm512_add_round_pd(a.x, b.x, down), _mm512_add_round_pd(a.x, b.x, up), _CMP_NEQ_OQ);
    return _mm512_castsi512_pd(_mm512_mask_or_epi64(sum, inexact, sum, _mm512_set1_epi64(1)));
}

struct U32 : BytesOfLanes<U32> {
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
        for (int i = 0; i < 4; i += 2) store_quarters(to + 16 * i, packed(from[i], from[i + 1]).x);
    }
    FUSEDSTEP_INLINE static void store(uint8_t* to, const U32 (&from)[4]) {
        store_packed(to, packed(from[0], from[1]), packed(from[2], from[3]));
    }
    // Two vectors as words, lane by lane, and two of such as bytes.
    FUSEDSTEP_INLINE friend U32 packed(U32 a, U32 b) { return _mm512_packus_epi32(a.x, b.x); }
    FUSEDSTEP_INLINE static void store_packed(void* to, U32 a, U32 b) {
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(a.x, b.x)));
    }
    // In 16-bit words: two vectors' worth, as order_of_words.hpp takes them.
    FUSEDSTEP_INLINE static U32 load_words(const uint16_t* from) { return _mm512_loadu_si512(from); }
    FUSEDSTEP_INLINE static U32 load_words(const uint8_t* from) {
        return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    FUSEDSTEP_INLINE static U32 load_words(const int8_t* from) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    FUSEDSTEP_INLINE static void store_words(uint8_t* to, U32 a, U32 b) {
        store_quarters(to, _mm512_packus_epi16(a.x, b.x));
    }
    // The upper bytes of words, with the uppermost bits flipped.
    FUSEDSTEP_INLINE static void store_upper_flipped(uint8_t* to, U32 a, U32 b) {
        const __m512i packed = _mm512_packus_epi16(_mm512_srli_epi16(a.x, 8), _mm512_srli_epi16(b.x, 8));
        store_quarters(to, _mm512_xor_si512(packed, _mm512_set1_epi8(INT8_MIN)));
    }
    // Of two vectors that were packed lane by lane.
    FUSEDSTEP_INLINE static void store_quarters(void* to, __m512i packed) {
        const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, packed));
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
    // The greatest lanes of each.
    FUSEDSTEP_INLINE friend Pair greatest(U32 a, U32 b) {
        __m512i m = _mm512_max_epu32(_mm512_unpacklo_epi32(a.x, b.x), _mm512_unpackhi_epi32(a.x, b.x));
        m = _mm512_max_epu32(m, _mm512_shuffle_i32x4(m, m, 0b01001110));
        m = _mm512_max_epu32(m, _mm512_shuffle_i32x4(m, m, 0b10110001));
        m = _mm512_max_epu32(m, _mm512_shuffle_epi32(m, _MM_PERM_BADC));
        return _mm_castsi128_ps(_mm512_castsi512_si128(m));
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
    FUSEDSTEP_INLINE friend U32 and_or(U32 a, U32 b, U32 c) {
        constexpr int a_and_b_or_c = 0xEA;
        return _mm512_ternarylogic_epi32(a.x, b.x, c.x, a_and_b_or_c);
    }
    FUSEDSTEP_INLINE friend U32 operator<<(U32 a, int n) { return _mm512_slli_epi32(a.x, n); }
    FUSEDSTEP_INLINE friend U32 operator>>(U32 a, int n) { return _mm512_srli_epi32(a.x, n); }
    FUSEDSTEP_INLINE friend U32 max(U32 a, U32 b) { return _mm512_max_epu32(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 if_greater(U32 a, U32 b, U32 yes, U32 no) {
        return _mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(a.x, b.x), no.x, yes.x);
    }
    // In each lane the sum of the products of two signed words.
    FUSEDSTEP_INLINE friend U32 multiplied_words(U32 a, U32 b) { return _mm512_madd_epi16(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 rounded_to_even(U32 a) {
        const __mmask16 odd = _mm512_test_epi32_mask(a.x, _mm512_set1_epi32(0x10000));
        return _mm512_mask_add_epi32((a + U32(0x7FFFu)).x, odd, a.x, _mm512_set1_epi32(0x8000));
    }
    FUSEDSTEP_INLINE friend U32 shifted_words(U32 a, int n) { return _mm512_slli_epi16(a.x, n); }
    FUSEDSTEP_INLINE friend U32 shifted_as_signed(U32 a, int n) { return _mm512_srai_epi32(a.x, n); }
    // Of words, the lower seven bits and bit `sign` in the eighth.
    FUSEDSTEP_INLINE friend U32 signed_bytes(U32 a, int sign) {
        constexpr int b_where_a_else_c = 0xCA;
        return _mm512_ternarylogic_epi32(U32(0x007F007Fu).x, a.x, _mm512_srli_epi16(a.x, sign - 7), b_where_a_else_c);
    }
    // The lower halves of `even` and the upper ones of `odd`, in turn.
    FUSEDSTEP_INLINE friend U32 words(U32 even, U32 odd) {
        constexpr int b_where_a_else_c = 0xCA;
        return _mm512_ternarylogic_epi32(U32(0xFFFF0000u).x, odd.x, even.x, b_where_a_else_c);
    }
};

FUSEDSTEP_INLINE F32 number_or(F32 a, F32 b) {
    const __m512i first_but_for_nan = _mm512_set1_epi32(0x11111100);
    return _mm512_fixupimm_ps(b.x, a.x, first_but_for_nan, 0);
}

FUSEDSTEP_INLINE bool any_nan(const F32 (&values)[4]) {
    return (_mm512_cmp_ps_mask(values[0].x, values[1].x, _CMP_UNORD_Q) |
            _mm512_cmp_ps_mask(values[2].x, values[3].x, _CMP_UNORD_Q)) != 0;
}

FUSEDSTEP_INLINE U32 bits_of(F32 value) { return _mm512_castps_si512(value.x); }
FUSEDSTEP_INLINE F32 from_bits(U32 bits) { return _mm512_castsi512_ps(bits.x); }

using OrderOfWords = fusedstep::OrderOfWords<F32>;

}  // namespace fusedstep::avx512
