// A job: what one call has to do, already checked, in terms that every backend understands.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "../rules/table.hpp"
#include "clipping.hpp"
#include "dtype.hpp"
#include "format.hpp"
#include "stream.hpp"

namespace fusedstep {

// The gradient's place among the streams of every rule.
constexpr int gradient_stream = 1;

// How to walk a parameter whose arrays do not share one dense layout. Strides are in bytes, the last
// dimension varies fastest. Blockwise formats have none: their elements are numbered in the order of the walk.
struct StridedLayout {
    std::vector<int64_t> shape;
    std::array<std::vector<int64_t>, max_streams> strides;
    std::array<std::vector<int64_t>, max_streams> extra_strides;
};

// How the elements of a parameter's streams are stored, where that is not in the type that the rule computes in.
struct Storage {
    std::array<Format, max_streams> formats{};
    std::array<void*, max_streams> extras{};  // what a format keeps beside the stream
    uint64_t random = 0;                      // the stream of this step's random bits ...
    const uint64_t* random_on_gpu = nullptr;  // ... or where in the GPU's memory it is
};

struct Tensor {
    std::array<void*, max_streams> streams;
    int64_t size;
    const void* scalars;                    // Rule::Scalars<element type>
    const StridedLayout* layout = nullptr;  // null: dense, element i is streams[k][i]
    const Storage* storage = nullptr;       // null: every stream is native
};

// Tensors of one rule and type. `ends[i]` is the number of elements in tensors 0 to i, so that the work
// can be cut over the concatenated elements.
struct Job {
    int rule;
    DType dtype;
    const Tensor* tensors;
    const int64_t* ends;
    int64_t count;
    bool scalars_on_gpu;      // the tensors' scalars are in the GPU's memory
    bool any_stored = false;  // some tensors have a storage
    bool zero_grad = false;   // the gradients are set to zero once they have been read
    // In the GPU's memory, what the norm has led to: the gradients' scale, and whether there is a step. Null: no norm.
    const NormOutcome* norm = nullptr;

    int64_t elements() const { return count == 0 ? 0 : ends[count - 1]; }

    // What a step has to move: every stream is read, and some are written back.
    int64_t bytes() const {
        const RuleStreams streams = rule_streams[rule];
        int64_t accesses = streams.count;
        for (unsigned written = streams.written; written != 0; written &= written - 1) ++accesses;
        if (zero_grad) ++accesses;
        return elements() * accesses * item_size(dtype);
    }
};

}  // namespace fusedstep
