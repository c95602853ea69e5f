// How AVX2 and AVX-512 store the bytes that words.hpp says of lanes. Packing makes 0 of what is negative.
#pragma once

#include <cstdint>

#include "../rules/inline.hpp"

namespace fusedstep {

// A base of U32, in whose terms it is.
template <class U32>
struct BytesOfLanes {
    FUSEDSTEP_INLINE static void store_bytes(uint8_t* to, const U32 (&from)[4], int bits) {
        U32 codes[4];
        for (int i = 0; i < 4; ++i) codes[i] = shifted_as_signed(from[i], bits);
        U32::store(to, codes);
    }
    FUSEDSTEP_INLINE static void store_bytes(int8_t* to, const U32 (&from)[4], int bits) {
        const auto pair = [&](int i) __attribute__((always_inline)) {
            return signed_bytes(packed(from[i] >> bits, from[i + 1] >> bits), 31 - bits);
        };
        U32::store_packed(to, pair(0), pair(2));
    }
};

}  // namespace fusedstep
