// Runs steps on a GPU. Every function leaves the calling thread's current device as it was, and throws
// std::runtime_error.
#pragma once

#include "../core/group_on_gpu.hpp"
#include "../core/job.hpp"
#include "../core/norm_job.hpp"

namespace fusedstep::cuda {

// Queues the job on a stream (a cudaStream_t) of a device, in as few launches as kernel parameters allow, and
// returns: nothing is allocated, nothing waited for.
void launch(const Job& job, int device, void* stream);

// Queues the beginning of a group's step, which the job that has its scalars must follow.
void begin_gd_step(const GroupOnGpu<GdHyper>& group, int device, void* stream);
void begin_adam_step(const GroupOnGpu<AdamHyper>& group, int device, void* stream);

// Queues the norm of a call's gradients, which the steps and jobs that have its outcome must follow.
void launch_norm(const NormJob& job, int device, void* stream);

// Loads all kernels of a rule and type onto a device; those for tensors with a storage where asked for.
void load(int rule, DType dtype, bool stored, int device);
void load_norm(int device);

// The device whose memory a pointer points to, or -1.
int device_of(const void* pointer);

}  // namespace fusedstep::cuda
