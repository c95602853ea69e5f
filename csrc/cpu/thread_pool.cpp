#include "thread_pool.hpp"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <system_error>
#include <thread>

#include "thread_count.hpp"

namespace fusedstep::cpu {
namespace {

constexpr uint64_t open_bit = uint64_t{1} << 31;
constexpr uint64_t inside_mask = open_bit - 1;
constexpr uint64_t epoch_of(uint64_t state) { return state >> 32; }

// How long an idle worker looks for the next job before it sleeps: longer than the gap between the steps
// of a tight loop, too short to be felt by anything else.
constexpr int64_t spin_nanoseconds = 1'000'000;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

std::atomic<ThreadPool*> pool{nullptr};
std::mutex pool_creation;

void forget_pool_in_child() {
    // The threads did not survive the fork, and the old pool's locks may be held by them: leave it be.
    pool.store(nullptr);
    new (&pool_creation) std::mutex;
}

}  // namespace

ThreadPool& ThreadPool::instance() {
    ThreadPool* current = pool.load(std::memory_order_acquire);
    if (current != nullptr) return *current;
    const std::lock_guard<std::mutex> lock(pool_creation);
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);
    static_cast<void>(registered);
    current = pool.load();
    // Never destroyed: at exit its threads may still be parked in it.
    if (current == nullptr) pool.store(current = new ThreadPool, std::memory_order_release);
    return *current;
}

void ThreadPool::start_workers(int wanted) {
    // Signals are for the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        for (; workers_ < wanted; ++workers_) {
            std::thread([this, participant = workers_.load() + 1] { worker_main(participant); }).detach();
        }
    } catch (const std::system_error&) {
        // The system has no more threads to give: the work is done by those there are.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void ThreadPool::run_chunks(int threads, int64_t chunks, bool worth_waking, const void* body, ChunkFunction function,
                            const Meanwhile& meanwhile) {
    threads = static_cast<int>(std::min<int64_t>(threads, chunks));
    std::unique_lock<std::mutex> lock(busy_, std::defer_lock);
    if (threads > 1 && (worth_waking || in_tight_loop(threads)) && lock.try_lock()) {
        share(threads, chunks, body, function, meanwhile);
    } else {
        if (meanwhile) meanwhile();
        for (int64_t chunk = 0; chunk < chunks; ++chunk) function(body, chunk);
    }
    last_end_.store(now(), std::memory_order_relaxed);
}

// Whether the workers are awake, or would be had the last job been shared.
bool ThreadPool::in_tight_loop(int threads) const {
    if (workers_.load() - parked_.load() >= threads - 1) return true;
    return now() - last_end_.load(std::memory_order_relaxed) < spin_nanoseconds;
}

void ThreadPool::share(int threads, int64_t chunks, const void* body, ChunkFunction function,
                       const Meanwhile& meanwhile) {
    if (workers_ < threads - 1) start_workers(threads - 1);
    if (share_capacity_ < threads) {
        shares_ = std::make_unique<Share[]>(threads);
        share_capacity_ = threads;
    }
    for (int i = 0; i < threads; ++i) {
        shares_[i].taken.store(0, std::memory_order_relaxed);
        shares_[i].begin = chunks * i / threads;
        shares_[i].end = chunks * (i + 1) / threads;
    }
    backward_ = !backward_;
    threads_ = threads;
    body_ = body;
    function_ = function;

    const uint64_t epoch = epoch_of(state_.load(std::memory_order_relaxed)) + 1;
    state_.store(epoch << 32 | open_bit);
    if (parked_.load() > 0) {
        const std::lock_guard<std::mutex> parking(parking_);
        unpark_.notify_all();
    }
    if (meanwhile) meanwhile();
    work(0);
    state_.fetch_and(~open_bit);
    for (int spins = 0; (state_.load(std::memory_order_acquire) & inside_mask) != 0; ++spins) {
        // With more threads than processors, the one we wait for may need ours.
        if (spins < 1000)
            pause();
        else
            sched_yield();
    }
}

void ThreadPool::work(int participant) {
    for (int i = 0; i < threads_; ++i) {
        Share& share = shares_[(participant + i) % threads_];
        for (;;) {
            const int64_t taken = share.taken.fetch_add(1, std::memory_order_relaxed);
            if (taken >= share.end - share.begin) break;
            function_(body_, backward_ ? share.end - 1 - taken : share.begin + taken);
        }
    }
}

void ThreadPool::worker_main(int participant) {
    uint64_t seen = 0;
    bool spin = true;
    for (;;) {
        uint64_t state = wait_for_job(seen, spin);
        if (!state_.compare_exchange_strong(state, state + 1)) continue;
        seen = epoch_of(state);
        spin = participant < threads_;
        if (spin) work(participant);
        state_.fetch_sub(1, std::memory_order_release);
    }
}

// Returns the state of an open job that this worker has not seen.
uint64_t ThreadPool::wait_for_job(uint64_t seen, bool spin) {
    const auto is_new = [seen](uint64_t state) { return (state & open_bit) != 0 && epoch_of(state) != seen; };
    if (spin) {
        const int64_t deadline = now() + spin_nanoseconds;
        do {
            for (int i = 0; i < 32; ++i) {
                const uint64_t state = state_.load(std::memory_order_acquire);
                if (is_new(state)) return state;
                pause();
            }
            // On a busy machine this may be the caller's own processor, which it needs back.
            sched_yield();
        } while (now() < deadline);
    }
    std::unique_lock<std::mutex> lock(parking_);
    parked_.fetch_add(1);
    uint64_t state = state_.load();
    while (!is_new(state)) {
        unpark_.wait(lock);
        state = state_.load();
    }
    parked_.fetch_sub(1);
    return state;
}

namespace {

std::mutex count_change;
std::atomic<int> count{0};
std::string reason;

}  // namespace

int num_threads() {
    const int current = count.load(std::memory_order_acquire);
    if (current != 0) return current;
    const std::lock_guard<std::mutex> lock(count_change);
    if (count.load() == 0) {
        const ThreadCount found = default_thread_count();
        reason = found.reason;
        count.store(found.count, std::memory_order_release);
    }
    return count.load();
}

const char* num_threads_reason() {
    num_threads();
    const std::lock_guard<std::mutex> lock(count_change);
    return reason.c_str();
}

void set_num_threads(int wanted) {
    const std::lock_guard<std::mutex> lock(count_change);
    reason = "set_num_threads";
    count.store(wanted, std::memory_order_release);
}

}  // namespace fusedstep::cpu
