// Copies to memory that this processor will not read: past its caches, so that a line is not fetched to be overwritten.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace fusedstep::cpu {

inline void copy_past_caches(char* to, const char* from, int64_t bytes) {
#ifdef __SSE2__
    const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & 15);
    std::memcpy(to, from, head);
    int64_t done = head;
    for (; done + 64 <= bytes; done += 64) {
        const auto* const source = reinterpret_cast<const __m128i*>(from + done);
        auto* const target = reinterpret_cast<__m128i*>(to + done);
        const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
        const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
        _mm_stream_si128(target, a);
        _mm_stream_si128(target + 1, b);
        _mm_stream_si128(target + 2, c);
        _mm_stream_si128(target + 3, d);
    }
    std::memcpy(to + done, from + done, bytes - done);
    _mm_sfence();
#else
    std::memcpy(to, from, bytes);
#endif
}

}  // namespace fusedstep::cpu
