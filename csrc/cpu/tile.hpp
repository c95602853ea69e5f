// Parameters whose arrays are not all dense and of the type that the rule computes in: tile by tile, every
// stream is gathered and decoded into contiguous buffers, stepped there by the ordinary kernel, and what was
// written is encoded and scattered back.
#pragma once

#include "../core/job.hpp"
#include "kernels.hpp"

namespace fusedstep::cpu {

void tiled_step(const KernelTable& kernels, const Job& job, const Tensor& tensor, int64_t begin, int64_t count);

}  // namespace fusedstep::cpu
