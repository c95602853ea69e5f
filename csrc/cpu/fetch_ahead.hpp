// Asking for memory before a loop gets there: more of it than the processor's own prefetching has under way, which also
// stops at the end of a page. At a memory's limit that is worth up to an eighth of the time.
#pragma once

#include <cstdint>

#include "../rules/inline.hpp"

namespace fusedstep {

constexpr int cache_line = 64;

// The lines in which `count` items lie, `bytes` further on.
template <int64_t count, int64_t bytes = 16 * cache_line, class Item>
FUSEDSTEP_INLINE void fetch_ahead(const Item* from) {
    constexpr int64_t lines = (count * sizeof(Item) + cache_line - 1) / cache_line;
    const char* const ahead = reinterpret_cast<const char*>(from) + bytes;
#pragma GCC unroll 8
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(ahead + i * cache_line);
}

}  // namespace fusedstep
