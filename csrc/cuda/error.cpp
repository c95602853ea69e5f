#include "error.hpp"

#include <stdexcept>

namespace fusedstep::cuda {
namespace {

std::string advice(cudaError_t error, const std::string& driver) {
    const std::string toolkit = version_text(CUDART_VERSION);
    switch (error) {
        case cudaErrorInsufficientDriver:
            if (driver == "none") {
                return "no NVIDIA driver is loaded on this machine; nvidia-smi should list the GPU (in a "
                       "container, start it with the GPUs given to it)";
            }
            return "the NVIDIA driver supports CUDA " + driver + ", but fusedstep was built with CUDA " + toolkit +
                   "; update the driver, or build fusedstep with a toolkit that it supports (12.1 at least)";
        case cudaErrorNoDevice:
            return "the driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES";
        case cudaErrorInvalidDevice:
            return "there is no such GPU for this process; check CUDA_VISIBLE_DEVICES";
        case cudaErrorSystemDriverMismatch:
        case cudaErrorCompatNotSupportedOnDevice:
            return "the driver's parts do not match each other (a reboot is due after an update, or a CUDA "
                   "compatibility library is in the way)";
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidDeviceFunction:
        case cudaErrorInvalidKernelImage:
        case cudaErrorUnsupportedPtxVersion:
            return "this build holds no code for this GPU (it has " FUSEDSTEP_CUDA_ARCHITECTURES
                   "); build with -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native";
        case cudaErrorIllegalAddress:
        case cudaErrorLaunchFailure:
        case cudaErrorLaunchTimeout:
        case cudaErrorMisalignedAddress:
        case cudaErrorInvalidAddressSpace:
        case cudaErrorInvalidPc:
        case cudaErrorIllegalInstruction:
        case cudaErrorHardwareStackError:
        case cudaErrorAssert:
        case cudaErrorECCUncorrectable:
            return "work queued earlier failed on the GPU, by fusedstep or another library, and this process "
                   "cannot use the GPU any more; start it again, with CUDA_LAUNCH_BLOCKING=1 or under "
                   "compute-sanitizer to find the call";
        default:
            return "";
    }
}

}  // namespace

std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string driver_version() {
    int version = 0;
    if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return "none";
    return version_text(version);
}

std::string error_text(cudaError_t error, const std::string& driver) {
    const std::string what = advice(error, driver);
    return std::string("CUDA: ") + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")" +
           (what.empty() ? "" : ": " + what);
}

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // it has been reported: the next call must not report it again
    throw std::runtime_error(error_text(error, driver_version()));
}

void check_driver() {
    int version = 0;
    check(cudaDriverGetVersion(&version));
    if (version < 12010) check(cudaErrorInsufficientDriver);
}

}  // namespace fusedstep::cuda
