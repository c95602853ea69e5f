// Moments in 8 bits: blocks of 64 elements share a float32 `unit`, and an element is a small float counted
// from one, y = 1 + |x| / unit, of which 4 bits of mantissa are kept. docs/eight_bit.md says why.
//
// Rounding is stochastic: to nearest, a second moment whose gradients have become smaller than its
// neighbours' would stay where it was, since (1 - beta2) of the way is less than half a code.
#pragma once

#include <cstdint>

#include "bfloat16.hpp"

namespace fusedstep {

constexpr uint32_t one_bits = 0x3F800000u;
constexpr int dropped_bits = 19;  // of y's mantissa
constexpr uint32_t nan_bits = 0x7FC00000u;

struct BlockScale {
    float unit, reciprocal;
};

// A block is finite when `greatest`, the largest of its magnitudes compared as integers, is; NaN are above
// infinity there. All codes of one that is not are 0, and its unit is NaN.
FUSEDSTEP_INLINE bool is_finite_block(uint32_t greatest) { return greatest < 0x7F800000u; }

template <class Moment>
FUSEDSTEP_INLINE BlockScale scale_of(float greatest) {
    const float unit = greatest * (1.0f / (Moment::most - 1.0f));
    const float kept = unit > 0x1p-112f ? unit : 0x1p-112f;
    return {kept, 1.0f / kept};
}

// y of the magnitude as its code: the bits above one.
template <class Moment, class V>
FUSEDSTEP_INLINE typename V::Bits code_of(typename V::Bits positive, V reciprocal, typename V::Bits random) {
    using B = typename V::Bits;
    const V y = min(fma(from_bits(positive), reciprocal, V(1.0f)), V(Moment::most));
    return (bits_of(y) - B(one_bits) + (random >> (32 - dropped_bits))) >> dropped_bits;
}

template <class V>
FUSEDSTEP_INLINE V value_of(typename V::Bits code, V unit) {
    using B = typename V::Bits;
    return (from_bits((code << dropped_bits) + B(one_bits)) - V(1.0f)) * unit;
}

// A first moment: 3 bits of exponent and 4 of mantissa, with a sign.
struct Signed8 {
    using Item = int8_t;
    static constexpr float most = 248.0f;
    static constexpr int random_half = 0;

    template <class V>
    FUSEDSTEP_INLINE static V decode(typename V::Bits code, V unit) {
        using B = typename V::Bits;
        return from_bits(bits_of(value_of<V>(absolute(code), unit)) | (code & B(0x80000000u)));
    }

    template <class V>
    FUSEDSTEP_INLINE static typename V::Bits encode(typename V::Bits bits, V reciprocal, typename V::Bits random) {
        return with_sign(code_of<Signed8, V>(magnitude(bits), reciprocal, random), bits);
    }
};

// A second moment: 4 bits of exponent and 4 of mantissa. One that is not 0 never gets the code 0, by which an
// update would be divided.
struct Unsigned8 {
    using Item = uint8_t;
    static constexpr float most = 63488.0f;
    static constexpr int random_half = 32;

    template <class V>
    FUSEDSTEP_INLINE static V decode(typename V::Bits code, V unit) {
        return value_of<V>(code, unit);
    }

    template <class V>
    FUSEDSTEP_INLINE static typename V::Bits encode(typename V::Bits bits, V reciprocal, typename V::Bits random) {
        using B = typename V::Bits;
        const B positive = magnitude(bits);
        return max(code_of<Unsigned8, V>(positive, reciprocal, random), min(positive, B(1u)));
    }
};

}  // namespace fusedstep
