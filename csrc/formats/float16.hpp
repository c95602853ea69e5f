// float16 (IEEE binary16). bfloat16.hpp says what a format is.
#pragma once

#include "bfloat16.hpp"

namespace fusedstep {

struct Float16 {
    using Item = uint16_t;
    using Extra = void;
    static constexpr int random = 0;
    static constexpr bool nan_is_bfloat16 = false;

    // The exponent is moved to float32's by a multiplication, which is exact and makes denormals normal.
    template <class V>
    FUSEDSTEP_INLINE static V decode(typename V::Bits item) {
        using B = typename V::Bits;
        const B sign = (item & B(0x8000u)) << 16;
        const B moved = bits_of(from_bits((item & B(0x7FFFu)) << 13) * V(0x1p112f));
        // Infinities and NaN have float16's greatest exponent.
        const B special = moved | B(0x7F800000u);
        return from_bits(sign | if_greater(moved, B(0x477FFFFFu), special, moved));
    }

    // To nearest, ties to even; from 65520 on that is an infinity.
    template <bool, class V>
    FUSEDSTEP_INLINE static void encode(V value, typename V::Bits, typename V::Bits& item, typename V::Bits&) {
        using B = typename V::Bits;
        const B bits = bits_of(value);
        const B positive = magnitude(bits);
        const B normal = (positive - B(112u << 23) + B(0xFFFu) + ((positive >> 13) & B(1u))) >> 13;
        // Adding 0.5 leaves a denormal's bits, rounded, at the end of the sum.
        const B denormal = bits_of(from_bits(positive) + V(0.5f)) - B(0x3F000000u);
        const B finite = if_greater(B(113u << 23), positive, denormal, normal);
        const B special = if_greater(positive, B(0x7F800000u), B(0x7E00u), B(0x7C00u));
        item = (if_greater(positive, B(0x477FFFFFu), special, finite) << 16) | (bits & B(0x80000000u));
    }
};

}  // namespace fusedstep
