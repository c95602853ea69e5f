// The type that the rule computes in. bfloat16.hpp says what a format is.
#pragma once

#include <cstdint>

#include "../rules/inline.hpp"

namespace fusedstep {

struct Native {
    using Item = uint32_t;
    using Extra = void;
    static constexpr int random = 0;
    static constexpr bool nan_is_bfloat16 = false;

    template <class V>
    FUSEDSTEP_INLINE static V decode(typename V::Bits item) {
        return from_bits(item);
    }

    template <bool, class V>
    FUSEDSTEP_INLINE static void encode(V value, typename V::Bits, typename V::Bits& item, typename V::Bits&) {
        item = bits_of(value);
    }
};

}  // namespace fusedstep
