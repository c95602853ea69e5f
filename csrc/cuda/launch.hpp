// Runs a job on a GPU: cuts it into as few launches as kernel parameters allow.
#pragma once

#include "../core/job.hpp"

namespace fusedstep::cuda {

// Queues the job on a stream (a cudaStream_t) of a device and returns: nothing is allocated, nothing waited
// for, and the calling thread's current device stays what it was. Throws std::runtime_error.
void launch(const Job& job, int device, void* stream);

// The device whose memory a pointer points to. Throws std::runtime_error.
int device_of(const void* pointer);

}  // namespace fusedstep::cuda
