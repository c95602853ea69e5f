#include "run.hpp"

#include <algorithm>
#include <cstring>

#include "../core/cut.hpp"
#include "dispatch.hpp"
#include "float_environment.hpp"
#include "thread_pool.hpp"
#include "tile.hpp"

namespace fusedstep::cpu {
namespace {

// One thread moves about 50 GB/s in cache. Below this a step is over before another thread has heard of it
// (about 6 microseconds of work) ...
constexpr int64_t least_shared_bytes = 300 * 1024;

// ... and below this, before a thread that sleeps has woken up (about 80).
constexpr int64_t least_waking_bytes = 4 * 1024 * 1024;

// A chunk is long enough to hide the cost of taking it and short enough to balance the threads.
constexpr int64_t least_chunk = 8 * 1024;
constexpr int64_t most_chunk = 32 * 1024;

// Calls body(from, to) for pieces of [0, elements).
template <class Body>
void parallel_for(int64_t elements, int64_t bytes, const Body& body) {
    const int threads = bytes < least_shared_bytes ? 1 : num_threads();
    if (threads == 1) {
        body(0, elements);
        return;
    }
    const int64_t chunk = std::clamp(elements / (threads * 8), least_chunk, most_chunk);
    const int64_t chunks = (elements + chunk - 1) / chunk;
    const bool worth_waking = bytes >= least_waking_bytes;
    ThreadPool::instance().run(threads, chunks, worth_waking,
                               [&](int64_t i) { body(elements * i / chunks, elements * (i + 1) / chunks); });
}

}  // namespace

bool is_long(int64_t bytes) { return bytes >= least_shared_bytes; }

void run(const Job& job) {
    const KernelTable& kernels = *chosen_isa().kernels;
    const StepKernel kernel = kernels.step[job.rule][static_cast<int>(job.dtype)];
    parallel_for(job.elements(), job.bytes(), [&](int64_t from, int64_t to) {
        const FloatEnvironment ieee;
        for_each_run(job, cut_at(job, from), cut_at(job, to), [&](const Tensor& tensor, int64_t begin, int64_t count) {
            if (tensor.layout == nullptr && tensor.storage == nullptr) {
                kernel(tensor.streams.data(), begin, count, tensor.scalars);
            } else {
                tiled_step(kernels, job, tensor, begin, count);
            }
        });
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
