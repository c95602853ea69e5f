#pragma once

#include <cuda_runtime_api.h>

#include "../core/job.hpp"

namespace fusedstep::cuda {

// Of a job's tensors, those that have a storage. The device is current.
void launch_stored(const Job& job, int device, cudaStream_t stream);
void load_stored(int rule, int device);

}  // namespace fusedstep::cuda
