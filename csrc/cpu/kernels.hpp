// What a per-ISA object provides: step loops by rule and element type, codecs by storage format, step loops for
// some combinations of formats, and loops for the norm by element type.
#pragma once

#include <cstdint>

#include "../core/dtype.hpp"
#include "../core/format.hpp"
#include "../core/stream.hpp"
#include "../rules/table.hpp"

namespace fusedstep {

using StepKernel = void (*)(void* const* streams, int64_t begin, int64_t count, const void* scalars);

constexpr int blocks_side_by_side = 4;  // where that is faster than one after the other: see norm.cpp

// Adding squares to the lanes of blocks, which core/norm.hpp describes.
struct NormKernel {
    void (*part)(const void* values, int64_t count, double* lanes);  // of one block
    void (*side_by_side)(const void* values, double* lanes);         // of blocks_side_by_side whole blocks
};

struct Codec {
    void (*decode)(const Stream& stream, int64_t at, int64_t count, float* values);
    void (*encode)(const Stream& stream, int64_t at, int64_t count, int64_t first_block, uint64_t random,
                   float* values);
};

// A step loop that is made for one combination of formats.
struct FusedStep {
    int rule;
    Format formats[max_streams];  // native past the rule's streams
    void (*run)(const Stream* streams, int64_t begin, int64_t count, const void* scalars, uint64_t random);
};

struct KernelTable {
    // The second ones are for Intel's processors, which are slow where they meet denormals, and faster when memory is
    // asked for before a loop gets there; AMD's are slower then.
    StepKernel step[2][Rules::count][dtype_count];
    Codec codec[format_count];
    const FusedStep* fused;
    int fused_count;
    NormKernel norm[dtype_count];
};

namespace scalar {
extern const KernelTable kernels;
}
namespace avx2 {
extern const KernelTable kernels;
}
namespace avx512 {
extern const KernelTable kernels;
}

}  // namespace fusedstep
