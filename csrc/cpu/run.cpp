#include "run.hpp"

#include <algorithm>
#include <cstring>

#include "../core/cut.hpp"
#include "dispatch.hpp"
#include "float_environment.hpp"
#include "parallel_for.hpp"
#include "tile.hpp"

namespace fusedstep::cpu {
namespace {

// Gradients that are set to zero are so after this many elements, while they are in the nearest cache.
constexpr int64_t zeroed_at_once = 2048;

// Calls visit(tensor, begin, count) for the whole job, in the threads of the pool.
template <class Visit>
void for_each_part(const Job& job, const Visit& visit, const Meanwhile& meanwhile = nullptr) {
    const auto part = [&](int64_t from, int64_t to) {
        const FloatEnvironment ieee;
        for_each_run(job, cut_at(job, from), cut_at(job, to), visit);
    };
    parallel_for(job.elements(), job.bytes(), part, meanwhile);
}

}  // namespace

bool is_long(int64_t bytes) { return bytes >= least_waking_bytes; }

void run(const Job& job, const Meanwhile& meanwhile) {
    const KernelTable& kernels = *chosen_isa().kernels;
    const StepKernel kernel = kernels.step[made_by_intel()][job.rule][static_cast<int>(job.dtype)];
    const auto step = [&](const Tensor& tensor, int64_t begin, int64_t count) {
        if (tensor.layout == nullptr && tensor.storage == nullptr) {
            kernel(tensor.streams.data(), begin, count, tensor.scalars);
        } else {
            tiled_step(kernels, job, tensor, begin, count);
        }
    };
    if (!job.zero_grad) {
        for_each_part(job, step, meanwhile);
        return;
    }
    const auto step_and_zero = [&](const Tensor& tensor, int64_t begin, int64_t count) {
        for (const int64_t end = begin + count; begin < end; begin += zeroed_at_once) {
            const int64_t n = std::min(zeroed_at_once, end - begin);
            step(tensor, begin, n);
            zero_gradient(job.dtype, tensor, begin, n);
        }
    };
    for_each_part(job, step_and_zero, meanwhile);
}

void zero_gradients(const Job& job) {
    for_each_part(job, [&](const Tensor& tensor, int64_t begin, int64_t count) {
        zero_gradient(job.dtype, tensor, begin, count);
    });
}

void fill_zero(void* memory, size_t bytes) {
    // In units of a float32, so that it is cut as a job over such elements is.
    constexpr int64_t unit = 4;
    const int64_t units = static_cast<int64_t>(bytes / unit);
    char* const begin = static_cast<char*>(memory);
    parallel_for(units, static_cast<int64_t>(bytes),
                 [&](int64_t from, int64_t to) { std::memset(begin + from * unit, 0, (to - from) * unit); });
    std::memset(begin + units * unit, 0, bytes - units * unit);
}

}  // namespace fusedstep::cpu
