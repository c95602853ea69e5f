#include "launch.hpp"

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "error.hpp"
#include "step_kernel.cuh"

namespace fusedstep::cuda {
namespace {

constexpr int block_threads = 256;
constexpr int most_cached_devices = 64;

template <class Rule, class T, class Placing, class Table>
__global__ void __launch_bounds__(block_threads) step_kernel(const __grid_constant__ Table table) {
    step_table<Rule, T, Placing>(table,
                                 {blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)});
}

// Makes a device's context current to the calling thread, and what was current before again at the end.
// cudaSetDevice cannot do the latter: a thread may have had no context at all, and to set device 0 for it
// would make one there.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        // A driver that has not been used yet refuses to say; there is no context then.
        if (Driver::instance().get(&before_) != CUDA_SUCCESS) before_ = nullptr;
        check(cudaSetDevice(device));
    }
    ~DeviceGuard() { Driver::instance().set(before_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    struct Driver {
        CUresult (*get)(CUcontext*);
        CUresult (*set)(CUcontext);

        static const Driver& instance() {
            static const Driver driver;
            return driver;
        }

        Driver() {
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

    CUcontext before_ = nullptr;
};

// How many blocks of a kernel the current device runs at a time.
int resident_blocks(const void* kernel, int device) {
    int processors = 0, blocks = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, block_threads, 0));
    return processors * std::max(blocks, 1);
}

template <class Rule, class T, class Placing, class Table>
void launch_table(const Table& table, int device, cudaStream_t stream) {
    const void* const kernel = reinterpret_cast<const void*>(&step_kernel<Rule, T, Placing, Table>);
    static std::atomic<int> known[most_cached_devices];
    int blocks = device < most_cached_devices ? known[device].load(std::memory_order_relaxed) : 0;
    if (blocks == 0) {
        blocks = resident_blocks(kernel, device);
        if (device < most_cached_devices) known[device].store(blocks, std::memory_order_relaxed);
    }
    const unsigned grid = std::min<unsigned>(table.chunks, blocks);
    void* arguments[] = {const_cast<Table*>(&table)};
    check(cudaLaunchKernel(kernel, grid, block_threads, arguments, 0, stream));
}

template <class Rule, class T>
void launch_typed(const Job& job, int device, cudaStream_t stream) {
    for_each_table<Rule, T, Dense>(job,
                                   [&](const auto& table) { launch_table<Rule, T, Dense>(table, device, stream); });
    for_each_table<Rule, T, Strided>(job,
                                     [&](const auto& table) { launch_table<Rule, T, Strided>(table, device, stream); });
}

template <class... All>
void launch_rule(RuleList<All...>, const Job& job, int device, cudaStream_t stream) {
    using Launch = void (*)(const Job&, int, cudaStream_t);
    static constexpr Launch launches[][dtype_count] = {{launch_typed<All, float>, launch_typed<All, double>}...};
    launches[job.rule][static_cast<int>(job.dtype)](job, device, stream);
}

}  // namespace

void launch(const Job& job, int device, void* stream) {
    if (job.elements() == 0) return;
    const DeviceGuard guard(device);
    launch_rule(Rules{}, job, device, static_cast<cudaStream_t>(stream));
}

int device_of(const void* pointer) {
    cudaPointerAttributes attributes;
    check(cudaPointerGetAttributes(&attributes, pointer));
    if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged)
        check(cudaErrorInvalidValue);
    return attributes.device;
}

}  // namespace fusedstep::cuda
