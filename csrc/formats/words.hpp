// Items of 8 and 16 bits on their way to the 32-bit lanes in which a rule computes. In general they are read into
// such lanes, B, and this is all there is to it. An instruction set may have a type of its own for them, with the
// same functions.
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

// ... and times 2^bits, of which the bits of `mask` count, with `base` beside them. `bits` is at least 16, and `base`
// has none below 2^16.
template <int bits, uint32_t mask, uint32_t base, class B>
FUSEDSTEP_INLINE B raised(B words) {
    return and_or(words << bits, B(mask), B(base));
}

// The byte that is kept of a lane: its sign and the 7 bits from `bits` on ...
FUSEDSTEP_INLINE uint32_t signed_byte(uint32_t lane, int bits) { return (lane >> 24 & 0x80u) | (lane >> bits & 0x7Fu); }

// ... or, of a lane without a sign, the 8 bits, all that it has above them. A negative one is 0.
FUSEDSTEP_INLINE uint32_t unsigned_byte(uint32_t lane, int bits) {
    return static_cast<int32_t>(lane) < 0 ? 0u : lane >> bits;
}

}  // namespace fusedstep
