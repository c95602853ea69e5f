// Devices, and how many blocks of threads of a kernel they run at a time.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>

#include "error.hpp"

namespace fusedstep::cuda {

constexpr int most_cached_devices = 64;

// Kernels that this process has launched.
extern std::atomic<int64_t> launches;

// Launches a kernel of one argument.
template <class Argument>
void launch_kernel(const void* function, unsigned grid, int threads, const Argument& argument, cudaStream_t stream) {
    void* arguments[] = {const_cast<Argument*>(&argument)};
    check(cudaLaunchKernel(function, grid, threads, arguments, 0, stream));
    launches.fetch_add(1, std::memory_order_relaxed);
}

// Makes a device's context current to the calling thread, and what was current before again at the end.
// cudaSetDevice cannot do the latter: a thread may have had no context at all, and to set device 0 for it
// would make one there.
class DeviceGuard {
public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    CUcontext before_ = nullptr;
};

// A kernel and how large its grid may be on each device; to find that out loads it there. `Which` has the kernel as
// `function()`, and as `threads` how many a block has.
template <class Which>
class Kernel {
public:
    static int most_blocks(int device) {
        static std::atomic<int> known[most_cached_devices];
        if (device >= most_cached_devices) return resident_blocks(device);
        int blocks = known[device].load(std::memory_order_relaxed);
        if (blocks == 0) {
            blocks = resident_blocks(device);
            known[device].store(blocks, std::memory_order_relaxed);
        }
        return blocks;
    }

    // For work that is in `pieces`, each for a block of threads.
    template <class Argument>
    static void launch(const Argument& argument, int64_t pieces, int device, cudaStream_t stream) {
        const auto grid = static_cast<unsigned>(std::min<int64_t>(pieces, most_blocks(device)));
        launch_kernel(Which::function(), grid, Which::threads, argument, stream);
    }

private:
    // How many blocks the current device runs at a time.
    static int resident_blocks(int device) {
        int processors = 0, blocks = 0;
        check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, Which::function(), Which::threads, 0));
        return processors * std::max(blocks, 1);
    }
};

}  // namespace fusedstep::cuda
