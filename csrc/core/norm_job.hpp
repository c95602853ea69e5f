// The norm of a call's gradients where a GPU computes it: what has to be added, and where the outcome goes. All memory
// is the GPU's.
#pragma once

#include <cstdint>

#include "clipping.hpp"
#include "job.hpp"
#include "norm.hpp"

namespace fusedstep {

struct NormJob {
    struct Gradient {
        const Tensor* tensor;
        DType dtype;  // what its rule computes in
    };

    const Gradient* gradients;  // in the order in which they are added
    int64_t count;
    double* workspace;  // as large as norm_workspace_bytes says
    NormOutcome* outcome;
    NormOptions options;
};

inline int64_t norm_blocks(int64_t elements) { return (elements + norm_block - 1) / norm_block; }

// A sum for each block and for each gradient, and as much to add them in.
inline int64_t norm_workspace_bytes(int64_t blocks, int64_t gradients) {
    return 2 * (blocks + gradients) * static_cast<int64_t>(sizeof(double));
}

}  // namespace fusedstep
