// Random bits that depend on nothing but the seed, the step and the number of the element in its tensor, so
// that they are the same however the work is cut and the tensors are grouped.
#pragma once

#include <cstdint>

#include "../rules/inline.hpp"

namespace fusedstep {

// The mixing of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
FUSEDSTEP_INLINE uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

constexpr uint64_t golden64 = 0x9E3779B97F4A7C15u;
constexpr uint32_t golden32 = 0x9E3779B9u;

// One for each step.
FUSEDSTEP_INLINE uint64_t random_stream(uint64_t seed, int64_t step) {
    return mix64(seed + static_cast<uint64_t>(step) * golden64);
}

// One for each block of elements of a tensor.
FUSEDSTEP_INLINE uint64_t random_block(uint64_t stream, uint64_t block) {
    return mix64(stream + (block + 1) * golden64);
}

// `count` random bits for each element of a block, whose numbers in it are `elements`: the upper ones of 32, of a
// Weyl sequence, which is more evenly spread than independent draws, with bits flipped at random. They are added to
// `base`, whose lower `count` bits are zero.
template <int count, uint32_t base = 0, class B>
FUSEDSTEP_INLINE B random_bits(uint32_t flipped, B elements) {
    return B((flipped >> (32 - count)) + base) ^ ((elements * B(golden32)) >> (32 - count));
}

}  // namespace fusedstep
