// Runs a job on the CPU: cuts it over the threads and calls the chosen instruction set's step loop.
#pragma once

#include <cstddef>

#include "../core/job.hpp"
#include "thread_pool.hpp"

namespace fusedstep::cpu {

void run(const Job& job, const Meanwhile& meanwhile = nullptr);

// Sets a job's gradients to zero, without a step.
void zero_gradients(const Job& job);

// Whether a job that moves this much takes long enough to let go of the GIL, which may be long in coming back.
bool is_long(int64_t bytes);

// Zeros memory, its pages first touched by the threads that will update them.
void fill_zero(void* memory, size_t bytes);

}  // namespace fusedstep::cpu
