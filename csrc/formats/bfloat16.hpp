// bfloat16, the upper half of a float32, and the ways in which a bfloat16 parameter keeps what rounding
// would lose.
//
// A format, like a rule, is mathematics and never sees memory: over a vector V of float32 and its integer
// companion V::Bits it turns an item (and what lies beside it, `extra`) into a value and back. Items of 16 bits
// are encoded into the upper half of a lane, extras of 8 bits into its second byte, whose uppermost bit is flipped.
// Encoding takes `random` random bits, and is told whether one of its values may be a NaN, because without one it is
// cheaper; the bits are the same.
// They are even for a NaN that is a bfloat16, the only ones that come of formats with `nan_is_bfloat16`.
#pragma once

#include <cstdint>

#include "../rules/inline.hpp"
#include "words.hpp"

namespace fusedstep {

template <class B>
FUSEDSTEP_INLINE B magnitude(B bits) {
    return bits & B(0x7FFFFFFFu);
}

// `rounded`, except for the bits of a NaN, which must not be rounded to an infinity.
template <bool may_be_nan, class B>
FUSEDSTEP_INLINE B keep_nan(B bits, B rounded) {
    if constexpr (!may_be_nan) return rounded;
    return if_greater(magnitude(bits), B(0x7F800000u), bits | B(0x400000u), rounded);
}

template <class B>
FUSEDSTEP_INLINE B rounded_to_even(B bits) {
    return bits + B(0x7FFFu) + ((bits >> 16) & B(1u));
}

struct BFloat16 {
    using Item = uint16_t;
    using Extra = void;
    static constexpr int random = 0;
    static constexpr bool nan_is_bfloat16 = true;

    template <class V, class Words>
    FUSEDSTEP_INLINE static V decode(Words item) {
        return from_bits(upper(item));
    }

    // To nearest, ties to even.
    template <bool may_be_nan, class V>
    FUSEDSTEP_INLINE static void encode(V value, typename V::Bits, typename V::Bits& item, typename V::Bits&) {
        using B = typename V::Bits;
        const B bits = bits_of(value);
        item = keep_nan<may_be_nan>(bits, rounded_to_even(bits));
    }
};

// Up with the probability of the part that rounding drops: 16 random bits are added before it is cut off
// (Gupta et al., "Deep learning with limited numerical precision", ICML 2015, section 3).
struct BFloat16Stochastic : BFloat16 {
    static constexpr int random = 16;

    template <bool may_be_nan, class V>
    FUSEDSTEP_INLINE static void encode(V value, typename V::Bits random, typename V::Bits& item, typename V::Bits&) {
        using B = typename V::Bits;
        const B bits = bits_of(value);
        item = keep_nan<may_be_nan>(bits, bits + random);
    }
};

// Whoever sets a parameter to 0 or infinity leaves the correction of what it was. Where both are the bits of a NaN,
// the bfloat16 is what counts.
template <class V>
FUSEDSTEP_INLINE V corrected(typename V::Bits item, typename V::Bits correction) {
    return number_or(from_bits(item + correction), from_bits(item));
}

// bfloat16 and the 16 bits that it lacks of a float32, so that together they are that float32 exactly. The
// bfloat16 is rounded to nearest with ties away from zero: with ties to even, 65537 float32 would round to
// some of the bfloat16, one more than 16 bits can tell apart. A NaN stays a NaN, with another payload.
struct BFloat16Correction16 {
    using Item = uint16_t;
    using Extra = int16_t;
    static constexpr int random = 0;
    static constexpr bool nan_is_bfloat16 = true;

    template <class V, class Words>
    FUSEDSTEP_INLINE static V decode(Words item, typename V::Bits extra) {
        return corrected<V>(upper(item), extra);
    }

    template <bool may_be_nan, class V>
    FUSEDSTEP_INLINE static void encode(V value, typename V::Bits, typename V::Bits& item, typename V::Bits& extra) {
        using B = typename V::Bits;
        const B bits = bits_of(value);
        item = keep_nan<may_be_nan>(bits, bits + B(0x8000u));
        extra = bits & B(0xFFFFu);
    }
};

// bfloat16 and the next 8 bits of the float32, both rounded to nearest with ties away from zero.
struct BFloat16Correction8 {
    using Item = uint16_t;
    using Extra = int8_t;
    static constexpr int random = 0;
    static constexpr bool nan_is_bfloat16 = true;

    template <class V, class Words>
    FUSEDSTEP_INLINE static V decode(Words item, Words extra) {
        return corrected<V>(upper(item), middle(extra));
    }

    template <bool may_be_nan, class V>
    FUSEDSTEP_INLINE static void encode(V value, typename V::Bits, typename V::Bits& item, typename V::Bits& extra) {
        using B = typename V::Bits;
        const B bits = bits_of(value);
        // Rounding the bfloat16 flips the uppermost bit of the correction.
        const B rounded = bits + B(0x8080u);
        item = keep_nan<may_be_nan>(bits, rounded);
        extra = rounded;
        // Of a NaN, nothing that could make an infinity of it.
        if constexpr (may_be_nan) extra = if_greater(magnitude(bits), B(0x7F800000u), B(0x8000u), extra);
    }
};

// The rounded value for whoever reads the parameter, and the float32 itself beside it.
template <class Low>
struct WithMaster {
    using Item = typename Low::Item;
    using Extra = uint32_t;
    static constexpr int random = 0;
    static constexpr bool nan_is_bfloat16 = false;

    template <class V, class Words>
    FUSEDSTEP_INLINE static V decode(Words, typename V::Bits extra) {
        return from_bits(extra);
    }

    template <bool may_be_nan, class V>
    FUSEDSTEP_INLINE static void encode(V value, typename V::Bits random, typename V::Bits& item,
                                        typename V::Bits& extra) {
        Low::template encode<may_be_nan, V>(value, random, item, extra);
        extra = bits_of(value);
    }
};

}  // namespace fusedstep
