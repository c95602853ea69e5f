// What fusedstep._core calls in a GPU backend, which another extension module provides as a capsule.
#pragma once

#include "../core/group_on_gpu.hpp"
#include "../core/job.hpp"
#include "../core/norm_job.hpp"

namespace fusedstep {

// Functions queue work on a stream of a device, and throw std::runtime_error.
struct GpuBackend {
    static constexpr const char* capsule_name = "fusedstep.GpuBackend";

    // Of the build: the two modules must come from one.
    const char* version;

    void (*launch)(const Job& job, int device, void* stream);

    // Counts a step of a group whose scalars are on the GPU and computes them.
    void (*begin_gd_step)(const GroupOnGpu<GdHyper>& group, int device, void* stream);
    void (*begin_adam_step)(const GroupOnGpu<AdamHyper>& group, int device, void* stream);

    // Computes the norm of a call's gradients, and what follows from it.
    void (*norm)(const NormJob& job, int device, void* stream);

    // Loads the kernels of a rule and type if they are not there yet, with those for tensors that have a storage or
    // without: their first launch would, but may not while a stream is captured, and may fail.
    void (*load)(int rule, DType dtype, bool stored, int device);
    void (*load_norm)(int device);

    // The GPU whose memory a pointer points to, or -1.
    int (*device_of)(const void* pointer);
};

}  // namespace fusedstep
