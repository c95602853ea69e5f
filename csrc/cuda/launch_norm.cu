#include "launch.hpp"

#include <cuda_runtime.h>

#include "device.hpp"
#include "norm_kernel.cuh"

namespace fusedstep::cuda {
namespace {

constexpr int block_threads = 256;
constexpr int least_blocks = 2;  // as for the kernels of a step
constexpr int sum_threads = 1024;

__device__ Place place() {
    return {blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
}

template <class Table>
__global__ void __launch_bounds__(block_threads, least_blocks) sum_blocks_kernel(const __grid_constant__ Table table) {
    sum_blocks(table, place(), Warp{});
}

template <class Table>
__global__ void __launch_bounds__(sum_threads) sum_gradients_kernel(const __grid_constant__ Table table) {
    sum_gradients(table, place(), Warp{});
}

__global__ void __launch_bounds__(sum_threads) end_norm_kernel(const NormEnd norm) { end_norm(norm, place(), Warp{}); }

template <class Table>
struct SumBlocks {
    static constexpr int threads = block_threads;
    static const void* function() { return reinterpret_cast<const void*>(&sum_blocks_kernel<Table>); }
};

template <class Table>
struct SumGradients {
    static constexpr int threads = sum_threads;
    static const void* function() { return reinterpret_cast<const void*>(&sum_gradients_kernel<Table>); }
};

struct EndNorm {
    static constexpr int threads = sum_threads;
    static const void* function() { return reinterpret_cast<const void*>(&end_norm_kernel); }
};

}  // namespace

void launch_norm(const NormJob& job, int device, void* stream) {
    const DeviceGuard guard(device);
    const auto queue = static_cast<cudaStream_t>(stream);
    const int64_t gradients = for_each_norm_table(job, [&](const auto& table) {
        using Table = std::decay_t<decltype(table)>;
        constexpr int64_t blocks_at_once = block_threads / Warp::threads;
        Kernel<SumBlocks<Table>>::launch(table, (table.chunks + blocks_at_once - 1) / blocks_at_once, device, queue);
        Kernel<SumGradients<Table>>::launch(table, table.count, device, queue);
    });
    Kernel<EndNorm>::launch(NormEnd{job.workspace, gradients, job.outcome, job.options}, 1, device, queue);
}

void load_norm(int device) {
    const DeviceGuard guard(device);
    Kernel<SumBlocks<SmallTable>>::most_blocks(device);
    Kernel<SumBlocks<LargeTable>>::most_blocks(device);
    Kernel<SumGradients<SmallTable>>::most_blocks(device);
    Kernel<SumGradients<LargeTable>>::most_blocks(device);
    Kernel<EndNorm>::most_blocks(device);
}

}  // namespace fusedstep::cuda
