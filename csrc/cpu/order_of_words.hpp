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

    FUSEDSTEP_INLINE friend HalfOfWords absolute(HalfOfWords a) { return {absolute_words(a.x), a.odd}; }
    FUSEDSTEP_INLINE friend B upper(HalfOfWords a) { return a.odd ? a.x & B(0xFFFF0000u) : a.x << 16; }
    FUSEDSTEP_INLINE friend B middle(HalfOfWords a) { return multiplied_words(a.x, B(a.odd ? 0x01000000u : 0x0100u)); }
    template <int bits, uint32_t base>
    FUSEDSTEP_INLINE friend B raised(HalfOfWords a) {
        static_assert(bits >= 16 && base % 0x10000u == 0);
        return upper(HalfOfWords{raised_words(a.x, bits - 16, base >> 16), a.odd});
    }
    FUSEDSTEP_INLINE friend V signed_as(V value, HalfOfWords of) {
        return signed_as(value, of.odd ? of.x : of.x << 16);
    }
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
    template <class Item>
    FUSEDSTEP_INLINE static void store(Item* block, int vector, const B (&from)[4]) {
        B::store_words(block + first(vector), words(from[0], from[1] << 16), words(from[2], from[3] << 16));
    }

private:
    FUSEDSTEP_INLINE static int first(int vector) { return vector / 2 * 2 * V::lanes; }
};

}  // namespace fusedstep
