// Launching the kernels of a step.
#pragma once

#include "device.hpp"
#include "step_kernel.cuh"

namespace fusedstep::cuda {

constexpr int block_threads = 256;

// Of threads, that a multiprocessor has room for at least. It is what keeps the elements of a thread in registers: left
// to itself, ptxas wants room for more blocks and spills.
template <class Placing>
constexpr int least_blocks = __is_same(Placing, Stored) ? 1 : 2;

template <class Rule, class T, class Placing, class Table>
__global__ void __launch_bounds__(block_threads, least_blocks<Placing>)
    step_kernel(const __grid_constant__ Table table) {
    step_table<Rule, T, Placing>(
        table, {blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)}, Warp{});
}

template <class Rule, class T, class Placing, class Table>
struct StepKernel {
    static constexpr int threads = block_threads;
    static const void* function() { return reinterpret_cast<const void*>(&step_kernel<Rule, T, Placing, Table>); }
};

template <class Rule, class T, class Placing>
void launch_placed(const Job& job, int device, cudaStream_t stream) {
    for_each_table<Rule, T, Placing>(job, [&](const auto& table) {
        using Table = std::decay_t<decltype(table)>;
        Kernel<StepKernel<Rule, T, Placing, Table>>::launch(table, table.chunks, device, stream);
    });
}

template <class Rule, class T, class Placing>
void load_placed(int device) {
    Kernel<StepKernel<Rule, T, Placing, SmallTable>>::most_blocks(device);
    Kernel<StepKernel<Rule, T, Placing, LargeTable>>::most_blocks(device);
}

// What a source file has for each rule.
struct RuleFunctions {
    void (*launch)(const Job&, int device, cudaStream_t);
    void (*load)(int device);
};

}  // namespace fusedstep::cuda
