// Sharing work over elements among the threads of the pool.
#pragma once

#include <algorithm>
#include <cstdint>

#include "thread_pool.hpp"

namespace fusedstep::cpu {

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
void parallel_for(int64_t elements, int64_t bytes, const Body& body, const Meanwhile& meanwhile = nullptr) {
    const int64_t most_threads = std::max<int64_t>(1, (elements + least_chunk - 1) / least_chunk);
    const int threads =
        bytes < least_shared_bytes ? 1 : static_cast<int>(std::min<int64_t>(num_threads(), most_threads));
    if (threads == 1) {
        if (meanwhile) meanwhile();
        body(0, elements);
        return;
    }
    const int64_t chunk = std::clamp(elements / (threads * 4), least_chunk, most_chunk);
    // As many for each thread, or one would wait for another's last.
    const int64_t chunks = (elements + chunk * threads - 1) / (chunk * threads) * threads;
    const bool worth_waking = bytes >= least_waking_bytes;
    ThreadPool::instance().run(
        threads, chunks, worth_waking, [&](int64_t i) { body(elements * i / chunks, elements * (i + 1) / chunks); },
        meanwhile);
}

}  // namespace fusedstep::cpu
