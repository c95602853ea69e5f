// What fusedstep._core calls in a GPU backend, which another extension module provides as a capsule.
#pragma once

#include "../core/job.hpp"

namespace fusedstep {

struct GpuBackend {
    static constexpr const char* capsule_name = "fusedstep.GpuBackend";

    // Of the build: the two modules must come from one.
    const char* version;

    // Queues a job on a stream of a device. Throws std::runtime_error.
    void (*launch)(const Job& job, int device, void* stream);

    // The GPU whose memory a pointer points to. Throws std::runtime_error.
    int (*device_of)(const void* pointer);
};

}  // namespace fusedstep
