// The table of storage formats: how the elements of one stream lie in memory. A rule computes in float32
// (or float64); a stream that is stored otherwise is decoded before it and encoded after it. A new format is
// a line here, a file in formats/ and a line in cpu/kernels.cpp.
#pragma once

#include <cstdint>

namespace fusedstep {

enum class Format : uint8_t {
    native,  // the type that the rule computes in
    bfloat16,
    float16,
    bfloat16_master,  // rounded to bfloat16; the value itself is a float32 beside it
    float16_master,
    bfloat16_correction16,  // bfloat16 and the 16 bits that it lacks
    bfloat16_correction8,   // bfloat16 and the next 8 bits
    bfloat16_stochastic,    // rounded to bfloat16 at random, right on average
    signed8,                // 8 bits in blocks with a scale, for a first moment
    unsigned8,              // the same for a second moment
};

constexpr int format_count = 10;

// Elements of the 8-bit formats that share a scale.
constexpr int64_t block_elements = 64;

constexpr int64_t block_count(int64_t elements) { return (elements + block_elements - 1) / block_elements; }

struct FormatLayout {
    int item;        // bytes of an element; 0: those of the type that the rule computes in
    int extra;       // bytes of an element in the array beside it
    bool blockwise;  // the array beside it has one float32 for each block instead
};

constexpr FormatLayout layout_of(Format format) {
    constexpr FormatLayout layouts[format_count] = {
        {0, 0, false}, {2, 0, false}, {2, 0, false}, {2, 4, false}, {2, 4, false},
        {2, 2, false}, {2, 1, false}, {2, 0, false}, {1, 0, true},  {1, 0, true},
    };
    return layouts[static_cast<int>(format)];
}

}  // namespace fusedstep
