// CUDA errors as exceptions that say what to do.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace fusedstep::cuda {

// A toolkit or driver version as NVIDIA writes it: 13000 is "13.0".
std::string version_text(int version);

// "12.4", or "none" where there is no driver.
std::string driver_version();

// What went wrong and what to do about it; `driver` is as driver_version() has it.
std::string error_text(cudaError_t error, const std::string& driver);

// Throws std::runtime_error unless `error` is success.
void check(cudaError_t error);

// Throws std::runtime_error unless the driver takes kernels with parameters of 32 KiB: one for CUDA 12.0 loads what a
// later 12 has built, but not these.
void check_driver();

}  // namespace fusedstep::cuda
