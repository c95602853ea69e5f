// Moments in 8 bits: blocks of 64 elements share a float32 `unit`, and an element is a small float y, |x| / unit
// counted from an `origin`, of which 4 bits of mantissa are kept. docs/eight_bit.md says why.
//
// Rounding is stochastic: to nearest, a second moment whose gradients have become smaller than its
// neighbours' would stay where it was, since (1 - beta2) of the way is less than half a code.
#pragma once

#include <cstdint>
#include <limits>

#include "bfloat16.hpp"
#include "random.hpp"
#include "words.hpp"

namespace fusedstep {

constexpr uint32_t two_bits = 0x40000000u;
constexpr int dropped_bits = 19;  // of y's mantissa
constexpr uint32_t nan_bits = 0x7FC00000u;
constexpr float infinity = std::numeric_limits<float>::infinity();  // device code may not call the function

template <class V>
struct BlockScale {
    V unit, reciprocal;
};

// Of a block's unit as stored. For a NaN, whatever its bits are, infinity: all codes are worth the NaN of infinity less
// infinity, which is a bfloat16.
template <class V>
FUSEDSTEP_INLINE V unit_of(V stored) {
    return min(stored, V(infinity));
}

// `greatest` is the largest of a block's magnitudes, compared as integers: NaN are above infinity there. A block
// that reaches 16 ulp below infinity has codes of 0 and a unit of NaN, so that what is finite decodes finite, and a
// block of zeros is zero bytes.
FUSEDSTEP_INLINE bool has_codes(uint32_t greatest) { return greatest - 1 < 0x7F7FFFF0u - 1; }
FUSEDSTEP_INLINE uint32_t unit_without_codes(uint32_t greatest) { return greatest == 0 ? 0 : nan_bits; }

// On the CPU, a block's scale is computed in one lane: a division of a whole vector takes three times as long.
FUSEDSTEP_INLINE float max(float a, float b) { return a > b ? a : b; }

template <class V>
FUSEDSTEP_INLINE BlockScale<V> scale_of(V greatest, V inverse_span) {
    const V unit = max(greatest * inverse_span, V(0x1p-112f));
    return {unit, V(1.0f) / unit};
}

template <class Moment, class V>
FUSEDSTEP_INLINE BlockScale<V> scale_of(V greatest) {
    return scale_of(greatest, V(Moment::inverse_span));
}

// What rounds the bits of y: random ones below the cut, and those of two are taken away. Adding uniform bits below
// the cut and cutting rounds up as often as the fraction that is cut says.
template <class B>
FUSEDSTEP_INLINE B rounding_of(uint32_t random, B elements) {
    return random_bits<dropped_bits, 0u - two_bits>(random, elements);
}

template <class V>
FUSEDSTEP_INLINE V with_sign_of(V positive, typename V::Bits of) {
    return from_bits(and_or(of, typename V::Bits(0x80000000u), bits_of(positive)));
}

// Of both: `size` of a value's bits, as an integer, is what the greatest of a block is chosen by. What is encoded is
// the bits of y above those of two, rounded at random; its code is what lies above the cut.

// A first moment: a sign, 3 bits of exponent and 4 of mantissa.
struct Signed8 {
    using Item = int8_t;
    static constexpr float origin = 2.0f;
    // The smallest float32 that is at least (1 + 2^-23) / (496 - 2): no y comes out above that of the largest code.
    static constexpr float inverse_span = 0x1.0953F6p-9f;

    template <class B>
    FUSEDSTEP_INLINE static B size(B bits) {
        return magnitude(bits);
    }

    template <class V, class Words>
    FUSEDSTEP_INLINE static V decode(Words code, V unit) {
        constexpr uint32_t sign_and_code = 0x80000000u | 0x7Fu << dropped_bits;
        const auto y = raised<dropped_bits, sign_and_code, two_bits>(code);
        return fms(from_bits(y), unit, with_sign_of(unit * V(origin), y));
    }

    template <class V>
    FUSEDSTEP_INLINE static typename V::Bits encode(typename V::Bits bits, V reciprocal, typename V::Bits rounding) {
        return bits_of(fma(from_bits(bits), reciprocal, with_sign_of(V(origin), bits))) + rounding;
    }

    // Of what is encoded, the code.
    FUSEDSTEP_INLINE static uint32_t code(uint32_t bits) { return signed_byte(bits, dropped_bits); }
};

// A second moment: 4 bits of exponent and 4 of mantissa. Code 0 is the smallest moment there is, by which an update can
// be divided, and not zero, which is a whole block only. Below that y is less than two, and its code is cut to 0.
struct Unsigned8 {
    using Item = uint8_t;
    static constexpr float origin = 1.9375f;
    static constexpr float inverse_span = 0x1.08431Cp-17f;  // the same of 126976 - 1.9375

    // A second moment has no sign. What has one all the same is NaN, or makes a NaN of its block.
    template <class B>
    FUSEDSTEP_INLINE static B size(B bits) {
        return bits;
    }

    template <class V, class Words>
    FUSEDSTEP_INLINE static V decode(Words code, V unit) {
        return fms(from_bits(raised<dropped_bits, 0xFFFFFFFFu, two_bits>(code)), unit, unit * V(origin));
    }

    template <class V>
    FUSEDSTEP_INLINE static typename V::Bits encode(typename V::Bits bits, V reciprocal, typename V::Bits rounding) {
        return bits_of(fma(from_bits(bits), reciprocal, V(origin))) + rounding;
    }

    FUSEDSTEP_INLINE static uint32_t code(uint32_t bits) { return unsigned_byte(bits, dropped_bits); }
};

}  // namespace fusedstep
