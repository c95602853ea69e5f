// The order in which items of 8 and 16 bits are read and written with the fewest instructions, where a vector of 16-bit
// words has the elements of two vectors of 32-bit lanes: those of even number, and then those of odd number.
#pragma once

#include <cstdint>

#include "../rules/inline.hpp"

namespace fusedstep {

// Words, into which items of 8 bits are widened, of which those of even or those of odd number are meant.
template <class V>
struct HalfOfWords {
    using B = typename V::Bits;

    B x;
    bool odd;

    FUSEDSTEP_INLINE friend B upper(HalfOfWords a) { return a.odd ? a.x & B(0xFFFF0000u) : a.x << 16; }
    FUSEDSTEP_INLINE friend B middle(HalfOfWords a) { return multiplied_words(a.x, B(a.odd ? 0x01000000u : 0x0100u)); }
    template <int bits, uint32_t mask, uint32_t base>
    FUSEDSTEP_INLINE friend B raised(HalfOfWords a) {
        static_assert(bits >= 16 && base % 0x10000u == 0);
        return upper(HalfOfWords{and_or(shifted_words(a.x, bits - 16), in_both(mask), in_both(base)), a.odd});
    }

private:
    FUSEDSTEP_INLINE static B in_both(uint32_t upper) { return B(upper >> 16 | (upper & 0xFFFF0000u)); }
};

template <class V>
struct OrderOfWords {
    using B = typename V::Bits;

    FUSEDSTEP_INLINE static B elements(int vector) {
        return B::lane_numbers() * B(2) + B(static_cast<uint32_t>(first(vector) + vector % 2));
    }

    template <class Item>
    FUSEDSTEP_INLINE static HalfOfWords<V> load(const Item* block, int vector) {
        return {B::load_words(block + first(vector)), vector % 2 != 0};
    }

    FUSEDSTEP_INLINE static void store_upper(uint16_t* block, int vector, const B (&from)[4]) {
        for (int i = 0; i < 4; i += 2) {
            words(from[i] >> 16, from[i + 1]).store(reinterpret_cast<uint32_t*>(block + first(vector + i)));
        }
    }
    FUSEDSTEP_INLINE static void store_middle(uint8_t* block, int vector, const B (&from)[4]) {
        B::store_upper_flipped(block + first(vector), words(from[0], from[1] << 16), words(from[2], from[3] << 16));
    }
    // The bytes of two vectors of words.
    template <int bits>
    FUSEDSTEP_INLINE static void store_bytes(uint8_t* block, int vector, const B (&from)[4]) {
        const auto pair = [&](int i) __attribute__((always_inline)) {
            return words(shifted_as_signed(from[i], bits), shifted_as_signed(from[i + 1], bits - 16));
        };
        B::store_words(block + first(vector), pair(0), pair(2));
    }
    template <int bits>
    FUSEDSTEP_INLINE static void store_bytes(int8_t* block, int vector, const B (&from)[4]) {
        const auto pair = [&](int i) __attribute__((always_inline)) {
            return signed_bytes(words(from[i] >> bits, from[i + 1] >> (bits - 16)), 31 - bits);
        };
        B::store_words(reinterpret_cast<uint8_t*>(block) + first(vector), pair(0), pair(2));
    }

private:
    FUSEDSTEP_INLINE static int first(int vector) { return vector / 2 * 2 * V::lanes; }
};

}  // namespace fusedstep
