// AVX2 + FMA. A partial load fills the other lanes with zeros; a partial store leaves memory past the
// count untouched. `max(a, b)` is `a > b ? a : b`, which is what vmaxps does: b when either is NaN. `min` likewise.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../rules/inline.hpp"
#include "bytes_of_lanes.hpp"
#include "order_of_words.hpp"
#include "pair.hpp"

namespace fusedstep::avx2 {

// The first n of eight 32-bit lanes: a window sliding over ones and then zeros.
alignas(32) static const int32_t lane_window[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

FUSEDSTEP_INLINE static __m256i first_lanes(int words) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane_window + 8 - words));
}

struct U32;

struct F32 {
    using Element = float;
    using Bits = U32;
    using OwnRoot = F32;
    static constexpr int lanes = 8;

    __m256 x;

    FUSEDSTEP_INLINE F32() : x(_mm256_setzero_ps()) {}
    FUSEDSTEP_INLINE explicit F32(float value) : x(_mm256_set1_ps(value)) {}
    FUSEDSTEP_INLINE F32(__m256 value) : x(value) {}

    FUSEDSTEP_INLINE static F32 load(const float* from) { return _mm256_loadu_ps(from); }
    FUSEDSTEP_INLINE static F32 load(const float* from, int n) { return _mm256_maskload_ps(from, first_lanes(n)); }
    FUSEDSTEP_INLINE void store(float* to) const { _mm256_storeu_ps(to, x); }
    FUSEDSTEP_INLINE void store(float* to, int n) const { _mm256_maskstore_ps(to, first_lanes(n), x); }

    FUSEDSTEP_INLINE static F32 first_of(Pair a) { return _mm256_broadcastss_ps(a.x); }
    FUSEDSTEP_INLINE static F32 second_of(Pair a) { return _mm256_broadcastss_ps(_mm_movehdup_ps(a.x)); }

    FUSEDSTEP_INLINE friend F32 operator+(F32 a, F32 b) { return _mm256_add_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 operator-(F32 a, F32 b) { return _mm256_sub_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 operator*(F32 a, F32 b) { return _mm256_mul_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 operator/(F32 a, F32 b) { return _mm256_div_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 max(F32 a, F32 b) { return _mm256_max_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 min(F32 a, F32 b) { return _mm256_min_ps(a.x, b.x); }
    FUSEDSTEP_INLINE friend F32 sqrt(F32 a) { return _mm256_sqrt_ps(a.x); }
    FUSEDSTEP_INLINE friend F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a.x, b.x, c.x); }
    FUSEDSTEP_INLINE friend F32 fms(F32 a, F32 b, F32 c) { return _mm256_fmsub_ps(a.x, b.x, c.x); }
};

struct F64 {
    using Element = double;
    using OwnRoot = F64;
    static constexpr int lanes = 4;

    __m256d x;

    FUSEDSTEP_INLINE F64() : x(_mm256_setzero_pd()) {}
    FUSEDSTEP_INLINE explicit F64(double value) : x(_mm256_set1_pd(value)) {}
    FUSEDSTEP_INLINE F64(__m256d value) : x(value) {}

    FUSEDSTEP_INLINE static F64 load(const double* from) { return _mm256_loadu_pd(from); }
    FUSEDSTEP_INLINE static F64 load(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
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

// All bits of a lane are set where it is denormal.
FUSEDSTEP_INLINE __m256 denormal_lanes(F32 a) {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(a.x), _mm256_set1_epi32(INT32_MAX));
    return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpeq_epi32(bits, _mm256_setzero_si256()),
                                                   _mm256_cmpgt_epi32(_mm256_set1_epi32(0x00800000), bits)));
}

FUSEDSTEP_INLINE bool any_denormal(F32 a, F32 b) {
    return _mm256_movemask_ps(_mm256_or_ps(denormal_lanes(a), denormal_lanes(b))) != 0;
}

FUSEDSTEP_INLINE F32 without_denormals(F32 a) { return _mm256_andnot_ps(denormal_lanes(a), a.x); }

FUSEDSTEP_INLINE bool all_zero(F32 a) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.x, _mm256_setzero_ps(), _CMP_NEQ_UQ)) == 0;
}

// Of their magnitudes. Nothing is true of a NaN.
FUSEDSTEP_INLINE bool all_at_least(F32 a, F32 least) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return _mm256_movemask_ps(
               _mm256_cmp_ps(_mm256_andnot_ps(sign, a.x), _mm256_andnot_ps(sign, least.x), _CMP_NGE_UQ)) == 0;
}

// As an integer, a denormal is its value times 2^149.
FUSEDSTEP_INLINE F32 sqrt_with_denormals(F32 a) {
    const __m256i bits = _mm256_castps_si256(a.x);
    const __m256 denormal =
        _mm256_and_ps(denormal_lanes(a), _mm256_castsi256_ps(_mm256_cmpgt_epi32(bits, _mm256_setzero_si256())));
    const __m256 scaled = _mm256_cvtepi32_ps(_mm256_slli_epi32(bits, 1));
    const F32 root = sqrt(F32(_mm256_blendv_ps(a.x, scaled, denormal)));
    return _mm256_blendv_ps(root.x, (root * F32(0x1p-75f)).x, denormal);
}

// The halves of a vector in float64, and back.
FUSEDSTEP_INLINE F64 lower_half(F32 a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a.x)); }
FUSEDSTEP_INLINE F64 upper_half(F32 a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a.x, 1)); }
FUSEDSTEP_INLINE F32 narrowed(F64 lower, F64 upper) {
    return _mm256_set_m128(_mm256_cvtpd_ps(upper.x), _mm256_cvtpd_ps(lower.x));
}

// a + b, and where that is not exact the odd one of its neighbours.
FUSEDSTEP_INLINE F64 sum_to_odd(F64 a, F64 b) {
    const F64 sum = a + b, of_b = sum - a;
    const F64 error = (a - (sum - of_b)) + (b - of_b);  // Knuth's, exact
    // Where the error points to zero, the neighbour there is the one that bits were cut off from.
    const __m256i bits = _mm256_castpd_si256(sum.x);
    const __m256d inexact = _mm256_cmp_pd(error.x, _mm256_setzero_pd(), _CMP_NEQ_OQ);
    const __m256i differ = _mm256_castpd_si256(_mm256_xor_pd(sum.x, error.x));
    const __m256i back = _mm256_and_si256(_mm256_srli_epi64(differ, 63), _mm256_castpd_si256(inexact));
    const __m256i odd = _mm256_or_si256(_mm256_sub_epi64(bits, back), _mm256_set1_epi64x(1));
    return _mm256_blendv_pd(sum.x, _mm256_castsi256_pd(odd), inexact);
}

struct U32 : BytesOfLanes<U32> {
    __m256i x;

    FUSEDSTEP_INLINE U32() : x(_mm256_setzero_si256()) {}
    FUSEDSTEP_INLINE explicit U32(uint32_t value) : x(_mm256_set1_epi32(static_cast<int>(value))) {}
    FUSEDSTEP_INLINE U32(__m256i value) : x(value) {}

    FUSEDSTEP_INLINE static U32 load(const uint32_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    FUSEDSTEP_INLINE static U32 load(const uint16_t* from) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    FUSEDSTEP_INLINE static U32 load(const int16_t* from) {
        return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    FUSEDSTEP_INLINE static U32 load(const uint8_t* from) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    }
    FUSEDSTEP_INLINE static U32 load(const int8_t* from) {
        return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    }
    FUSEDSTEP_INLINE void store(uint32_t* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
    // Four vectors, each lane of which fits an item.
    FUSEDSTEP_INLINE static void store(uint32_t* to, const U32 (&from)[4]) {
        for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * i), from[i].x);
    }
    FUSEDSTEP_INLINE static void store(uint16_t* to, const U32 (&from)[4]) {
        for (int i = 0; i < 4; i += 2) store_quarters(to + 8 * i, packed(from[i], from[i + 1]).x);
    }
    FUSEDSTEP_INLINE static void store(uint8_t* to, const U32 (&from)[4]) {
        store_packed(to, packed(from[0], from[1]), packed(from[2], from[3]));
    }
    // Two vectors as words, lane by lane, and two of such as bytes.
    FUSEDSTEP_INLINE friend U32 packed(U32 a, U32 b) { return _mm256_packus_epi32(a.x, b.x); }
    FUSEDSTEP_INLINE static void store_packed(void* to, U32 a, U32 b) {
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256(static_cast<__m256i*>(to),
                            _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a.x, b.x), order));
    }
    // In 16-bit words: two vectors' worth, as order_of_words.hpp takes them.
    FUSEDSTEP_INLINE static U32 load_words(const uint16_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    FUSEDSTEP_INLINE static U32 load_words(const uint8_t* from) {
        return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    FUSEDSTEP_INLINE static U32 load_words(const int8_t* from) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    FUSEDSTEP_INLINE static void store_words(uint8_t* to, U32 a, U32 b) {
        store_quarters(to, _mm256_packus_epi16(a.x, b.x));
    }
    // The upper bytes of words, with the uppermost bits flipped.
    FUSEDSTEP_INLINE static void store_upper_flipped(uint8_t* to, U32 a, U32 b) {
        const __m256i packed = _mm256_packus_epi16(_mm256_srli_epi16(a.x, 8), _mm256_srli_epi16(b.x, 8));
        store_quarters(to, _mm256_xor_si256(packed, _mm256_set1_epi8(INT8_MIN)));
    }
    // Of two vectors that were packed lane by lane.
    FUSEDSTEP_INLINE static void store_quarters(void* to, __m256i packed) {
        _mm256_storeu_si256(static_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0b11011000));
    }
    FUSEDSTEP_INLINE static U32 lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
    // The greatest of the lanes, in all of them.
    FUSEDSTEP_INLINE U32 greatest() const {
        __m256i m = _mm256_max_epu32(x, _mm256_permute2x128_si256(x, x, 0x01));
        m = _mm256_max_epu32(m, _mm256_shuffle_epi32(m, 0b01001110));
        return _mm256_max_epu32(m, _mm256_shuffle_epi32(m, 0b10110001));
    }
    // The greatest lanes of each.
    FUSEDSTEP_INLINE friend Pair greatest(U32 a, U32 b) {
        __m256i m = _mm256_max_epu32(_mm256_unpacklo_epi32(a.x, b.x), _mm256_unpackhi_epi32(a.x, b.x));
        m = _mm256_max_epu32(m, _mm256_permute2x128_si256(m, m, 0x01));
        m = _mm256_max_epu32(m, _mm256_shuffle_epi32(m, 0b01001110));
        return _mm_castsi128_ps(_mm256_castsi256_si128(m));
    }
    FUSEDSTEP_INLINE uint32_t first() const {
        return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(x)));
    }

    FUSEDSTEP_INLINE friend U32 operator+(U32 a, U32 b) { return _mm256_add_epi32(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 operator-(U32 a, U32 b) { return _mm256_sub_epi32(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 operator*(U32 a, U32 b) { return _mm256_mullo_epi32(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 operator&(U32 a, U32 b) { return _mm256_and_si256(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 operator|(U32 a, U32 b) { return _mm256_or_si256(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 operator^(U32 a, U32 b) { return _mm256_xor_si256(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 and_or(U32 a, U32 b, U32 c) { return (a & b) | c; }
    FUSEDSTEP_INLINE friend U32 operator<<(U32 a, int n) { return _mm256_slli_epi32(a.x, n); }
    FUSEDSTEP_INLINE friend U32 operator>>(U32 a, int n) { return _mm256_srli_epi32(a.x, n); }
    FUSEDSTEP_INLINE friend U32 max(U32 a, U32 b) { return _mm256_max_epu32(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 if_greater(U32 a, U32 b, U32 yes, U32 no) {
        return _mm256_blendv_epi8(no.x, yes.x, _mm256_cmpgt_epi32(a.x, b.x));
    }
    // In each lane the sum of the products of two signed words.
    FUSEDSTEP_INLINE friend U32 multiplied_words(U32 a, U32 b) { return _mm256_madd_epi16(a.x, b.x); }
    FUSEDSTEP_INLINE friend U32 shifted_words(U32 a, int n) { return _mm256_slli_epi16(a.x, n); }
    FUSEDSTEP_INLINE friend U32 shifted_as_signed(U32 a, int n) { return _mm256_srai_epi32(a.x, n); }
    // Of words, the lower seven bits and bit `sign` in the eighth.
    FUSEDSTEP_INLINE friend U32 signed_bytes(U32 a, int sign) {
        return (a & U32(0x007F007Fu)) | (U32(_mm256_srli_epi16(a.x, sign - 7)) & U32(0x00800080u));
    }
    // The lower halves of `even` and the upper ones of `odd`, in turn.
    FUSEDSTEP_INLINE friend U32 words(U32 even, U32 odd) { return _mm256_blend_epi16(even.x, odd.x, 0b10101010); }
};

FUSEDSTEP_INLINE F32 number_or(F32 a, F32 b) {
    return _mm256_blendv_ps(a.x, b.x, _mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q));
}

FUSEDSTEP_INLINE bool any_nan(const F32 (&values)[4]) {
    const __m256 ab = _mm256_cmp_ps(values[0].x, values[1].x, _CMP_UNORD_Q);
    const __m256 cd = _mm256_cmp_ps(values[2].x, values[3].x, _CMP_UNORD_Q);
    return _mm256_movemask_ps(_mm256_or_ps(ab, cd)) != 0;
}

FUSEDSTEP_INLINE U32 bits_of(F32 value) { return _mm256_castps_si256(value.x); }
FUSEDSTEP_INLINE F32 from_bits(U32 bits) { return _mm256_castsi256_ps(bits.x); }

using OrderOfWords = fusedstep::OrderOfWords<F32>;

}  // namespace fusedstep::avx2
