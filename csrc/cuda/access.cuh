// How a thread moves elements that are neighbours in memory: 16 bytes at a time where their address allows it, else
// in the widest pieces that it does allow.
#pragma once

#include <cstdint>
#include <type_traits>

#include "step_table.hpp"
#include "unroll.hpp"

namespace fusedstep::cuda {

// What one instruction moves.
template <class Word, int words>
struct alignas(sizeof(Word) * words) Piece {
    Word x[words];
};

// One item among those that lie in words as they do in memory.
template <class Item, int length>
FUSEDSTEP_INLINE uint32_t item_in(const uint32_t (&words)[length], int i) {
    constexpr int in_word = 4 / sizeof(Item);
    return static_cast<Item>(words[i / in_word] >> (i % in_word * 8 * sizeof(Item)));
}

// Items are put in one after the other.
template <class Item, int length>
FUSEDSTEP_INLINE void put_item_in(uint32_t (&words)[length], int i, uint32_t item) {
    constexpr int in_word = 4 / sizeof(Item);
    const uint32_t bits = static_cast<Item>(item);
    uint32_t& word = words[i / in_word];
    word = i % in_word == 0 ? bits : word | bits << (i % in_word * 8 * sizeof(Item));
}

constexpr int widest_piece(int bytes) { return bytes < pack_bytes ? bytes : pack_bytes; }

template <int bytes>
using PartOfWord = std::conditional_t<bytes == 2, uint16_t, uint8_t>;

// Reads `bytes` of memory into words. Its address is a multiple of `item`, and perhaps of `widest`.
template <int bytes, int item, int widest = widest_piece(bytes), class Word, int length>
FUSEDSTEP_INLINE void read_elements(const char* from, Word (&to)[length]) {
    if constexpr (widest > item) {
        if (reinterpret_cast<uintptr_t>(from) % widest != 0) return read_elements<bytes, item, widest / 2>(from, to);
    }
    FUSEDSTEP_UNROLL
    for (int i = 0; i < bytes / widest; ++i) {
        if constexpr (widest >= sizeof(Word)) {
            constexpr int words = widest / sizeof(Word);
            const auto piece = reinterpret_cast<const Piece<Word, words>*>(from)[i];
            FUSEDSTEP_UNROLL
            for (int j = 0; j < words; ++j) to[i * words + j] = piece.x[j];
        } else {
            put_item_in<PartOfWord<widest>>(to, i, reinterpret_cast<const PartOfWord<widest>*>(from)[i]);
        }
    }
}

template <int bytes, int item, int widest = widest_piece(bytes), class Word, int length>
FUSEDSTEP_INLINE void write_elements(const Word (&from)[length], char* to) {
    if constexpr (widest > item) {
        if (reinterpret_cast<uintptr_t>(to) % widest != 0) return write_elements<bytes, item, widest / 2>(from, to);
    }
    FUSEDSTEP_UNROLL
    for (int i = 0; i < bytes / widest; ++i) {
        if constexpr (widest >= sizeof(Word)) {
            constexpr int words = widest / sizeof(Word);
            Piece<Word, words> piece;
            FUSEDSTEP_UNROLL
            for (int j = 0; j < words; ++j) piece.x[j] = from[i * words + j];
            reinterpret_cast<Piece<Word, words>*>(to)[i] = piece;
        } else {
            reinterpret_cast<PartOfWord<widest>*>(to)[i] =
                static_cast<PartOfWord<widest>>(item_in<PartOfWord<widest>>(from, i));
        }
    }
}

}  // namespace fusedstep::cuda
