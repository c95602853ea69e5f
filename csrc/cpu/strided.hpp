// Arrays that do not share one dense layout: a tile of every stream is gathered into contiguous buffers,
// stepped there by the ordinary kernel, and what was written is scattered back.
#pragma once

#include "../core/job.hpp"
#include "kernels.hpp"

namespace fusedstep::cpu {

void strided_step(StepKernel kernel, const Job& job, const Tensor& tensor, int64_t begin, int64_t count);

}  // namespace fusedstep::cpu
