// Parameters whose arrays are not all dense and of the type that the rule computes in: tile by tile, every
// stream is gathered and decoded into contiguous buffers, stepped there by the ordinary kernel, and what was
// written is encoded and scattered back.
#pragma once

#include "../core/job.hpp"
#include "kernels.hpp"

namespace fusedstep::cpu {

void tiled_step(const KernelTable& kernels, const Job& job, const Tensor& tensor, int64_t begin, int64_t count);

// Adds the squares of elements [begin, begin + count) of a gradient, part of one block, to the block's lanes. Here
// and below the gradient may be dense and native too, and `dtype` is what its rule computes in.
void add_squares_of_gradient(const KernelTable& kernels, DType dtype, const Tensor& tensor, int64_t begin,
                             int64_t count, double* lanes);

// Sets elements [begin, begin + count) of a gradient to zero.
void zero_gradient(DType dtype, const Tensor& tensor, int64_t begin, int64_t count);

}  // namespace fusedstep::cpu
