// An order says which elements of a block are in which of its vectors, and reads and writes them so.
#pragma once

#include <cstdint>

#include "../rules/inline.hpp"

namespace fusedstep {

// As the elements lie in memory.
template <class V>
struct Natural {
    using B = typename V::Bits;

    FUSEDSTEP_INLINE static B elements(int vector) { return B::lane_numbers() + B(vector * V::lanes); }

    template <class Item>
    FUSEDSTEP_INLINE static B load(const Item* block, int vector) {
        return B::load(block + vector * V::lanes);
    }

    template <class Item>
    FUSEDSTEP_INLINE static void store(Item* block, int vector, B from) {
        from.store(block + vector * V::lanes);
    }

    // Four vectors from `vector` on, each lane of which fits an item ...
    template <class Item>
    FUSEDSTEP_INLINE static void store(Item* block, int vector, const B (&from)[4]) {
        B::store(block + vector * V::lanes, from);
    }

    // ... or has it in its upper half ...
    FUSEDSTEP_INLINE static void store_upper(uint16_t* block, int vector, const B (&from)[4]) {
        store(block, vector, {from[0] >> 16, from[1] >> 16, from[2] >> 16, from[3] >> 16});
    }

    // ... or in the byte that words.hpp says, from `bits` on ...
    template <int bits, class Item>
    FUSEDSTEP_INLINE static void store_bytes(Item* block, int vector, const B (&from)[4]) {
        B::store_bytes(block + vector * V::lanes, from, bits);
    }

    // ... or in its second byte, with the uppermost bit flipped.
    FUSEDSTEP_INLINE static void store_middle(uint8_t* block, int vector, const B (&from)[4]) {
        B items[4];
        for (int i = 0; i < 4; ++i) items[i] = ((from[i] >> 8) & B(0xFFu)) ^ B(0x80u);
        store(block, vector, items);
    }
};

}  // namespace fusedstep
