#include "device.hpp"

namespace fusedstep::cuda {
namespace {

struct Driver {
    CUresult (*get)(CUcontext*);
    CUresult (*set)(CUcontext);

    static const Driver& instance() {
        static const Driver driver;
        return driver;
    }

    Driver() {
        check_driver();
        find("cuCtxGetCurrent", get);
        find("cuCtxSetCurrent", set);
    }

    template <class Function>
    static void find(const char* name, Function& function) {
        void* address = nullptr;
        cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
        check(cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &found));
#else
        check(cudaGetDriverEntryPoint(name, &address, cudaEnableDefault, &found));
#endif
        if (found != cudaDriverEntryPointSuccess) check(cudaErrorInsufficientDriver);
        function = reinterpret_cast<Function>(address);
    }
};

}  // namespace

std::atomic<int64_t> launches{0};

DeviceGuard::DeviceGuard(int device) {
    // A driver that has not been used yet refuses to say; there is no context then.
    if (Driver::instance().get(&before_) != CUDA_SUCCESS) before_ = nullptr;
    check(cudaSetDevice(device));
}

DeviceGuard::~DeviceGuard() { Driver::instance().set(before_); }

}  // namespace fusedstep::cuda
