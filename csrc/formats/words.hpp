// Items of 8 and 16 bits on their way to the 32-bit lanes in which a rule computes. In general they are read into
// such lanes, B, and this is all there is to it. An instruction set may have a type of its own for them, with the
// same functions, absolute() and signed_as().
#pragma once

#include <cstdint>

#include "../rules/inline.hpp"

namespace fusedstep {

// The items times 2^16, of which a bfloat16 is a float32 ...
template <class B>
FUSEDSTEP_INLINE B upper(B words) {
    return words << 16;
}

// ... times 2^8 ...
template <class B>
FUSEDSTEP_INLINE B middle(B words) {
    return words << 8;
}

// ... and times 2^bits, with `base` added, of which the lower 16 bits are zero. `bits` is at least 16.
template <int bits, uint32_t base, class B>
FUSEDSTEP_INLINE B raised(B words) {
    static_assert(bits >= 16 && base % 0x10000u == 0);
    return (words << bits) + B(base);
}

}  // namespace fusedstep
