// Moments in 8 bits: blocks of 64 elements share a float32 `unit`, and an element is a small float counted
// from one, y = 1 + |x| / unit, of which 4 bits of mantissa are kept. docs/eight_bit.md says why.
//
// Rounding is stochastic: to nearest, a second moment whose gradients have become smaller than its
// neighbours' would stay where it was, since (1 - beta2) of the way is less than half a code.
#pragma once

#include <cstdint>
#include <limits>

#include "bfloat16.hpp"
#include "random.hpp"

namespace fusedstep {

constexpr uint32_t one_bits = 0x3F800000u;
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
// that reaches 16 ulp below infinity has codes of 0 and a unit of NaN, so that what is finite decodes finite.
FUSEDSTEP_INLINE bool is_finite_block(uint32_t greatest) { return greatest < 0x7F7FFFF0u; }

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

// What rounds the bits of y: random ones below the cut, and those of one are taken away. Adding uniform bits below
// the cut and cutting rounds up as often as the fraction that is cut says.
template <class B>
FUSEDSTEP_INLINE B rounding_of(uint32_t random, B elements) {
    return random_bits<dropped_bits, 0u - one_bits>(random, elements);
}

// The bits of y above those of one, rounded at random.
template <class V>
FUSEDSTEP_INLINE typename V::Bits code_of(typename V::Bits positive, V reciprocal, typename V::Bits rounding) {
    return (bits_of(fma(from_bits(positive), reciprocal, V(1.0f))) + rounding) >> dropped_bits;
}

template <class V, class Words>
FUSEDSTEP_INLINE V value_of(Words code, V unit) {
    return fms(from_bits(raised<dropped_bits, one_bits>(code)), unit, unit);  // (y - 1) * unit
}

// Of both: `size` of a value's bits, as an integer, is what the greatest of a block is chosen by.

// A first moment: 3 bits of exponent and 4 of mantissa, with a sign.
struct Signed8 {
    using Item = int8_t;
    // The smallest float32 that is at least (1 + 2^-23) / 247: no y comes out above that of the largest code.
    static constexpr float inverse_span = 0x1.0953F6p-8f;

    template <class B>
    FUSEDSTEP_INLINE static B size(B bits) {
        return magnitude(bits);
    }

    template <class V, class Words>
    FUSEDSTEP_INLINE static V decode(Words code, V unit) {
        return value_of(absolute(code), signed_as(unit, code));
    }

    template <class V>
    FUSEDSTEP_INLINE static typename V::Bits encode(typename V::Bits bits, V reciprocal, typename V::Bits rounding) {
        return with_sign(code_of<V>(magnitude(bits), reciprocal, rounding), bits);
    }
};

// A second moment: 4 bits of exponent and 4 of mantissa. One that is not 0 never gets the code 0, by which an
// update would be divided.
struct Unsigned8 {
    using Item = uint8_t;
    static constexpr float inverse_span = 0x1.084324p-16f;  // the same of 63487

    // A second moment has no sign. What has one all the same is NaN, or makes a NaN of its block.
    template <class B>
    FUSEDSTEP_INLINE static B size(B bits) {
        return bits;
    }

    template <class V, class Words>
    FUSEDSTEP_INLINE static V decode(Words code, V unit) {
        return value_of(code, unit);
    }

    template <class V>
    FUSEDSTEP_INLINE static typename V::Bits encode(typename V::Bits bits, V reciprocal, typename V::Bits rounding) {
        return max(code_of<V>(bits, reciprocal, rounding), min(bits, typename V::Bits(1u)));
    }
};

}  // namespace fusedstep
