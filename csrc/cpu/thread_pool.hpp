// A persistent pool. The caller is participant 0 and works too; work is handed out in chunks, so a worker
// that wakes late costs nothing and a processor that is busy elsewhere takes less. Participant i starts
// with the chunks that were its own the last time, whose memory is near it, and then helps the others.
//
// No thread starts before the first parallel step. A forked child starts its own pool. Two threads of the
// program that step at once do not wait for each other: the second runs its chunks itself.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

namespace fusedstep::cpu {

// Work for the calling thread alone, done before its first chunk: other threads may begin with theirs meanwhile.
// It must not throw.
using Meanwhile = std::function<void()>;

class ThreadPool {
public:
    static ThreadPool& instance();

    // Calls body(chunk) once for each chunk in [0, chunks), on at most `threads` threads. A job that is not
    // worth waking a sleeping thread for is shared only in a tight loop, where they are awake.
    template <class Body>
    void run(int threads, int64_t chunks, bool worth_waking, const Body& body, const Meanwhile& meanwhile) {
        run_chunks(
            threads, chunks, worth_waking, &body,
            [](const void* body, int64_t chunk) { (*static_cast<const Body*>(body))(chunk); }, meanwhile);
    }

private:
    // The chunks of one participant, [begin, end), of which so many are taken; others take some too once they have
    // done their own.
    struct alignas(64) Share {
        std::atomic<int64_t> taken;
        int64_t begin, end;
    };

    using ChunkFunction = void (*)(const void* body, int64_t chunk);

    void run_chunks(int threads, int64_t chunks, bool worth_waking, const void* body, ChunkFunction function,
                    const Meanwhile& meanwhile);
    bool in_tight_loop(int threads) const;
    void share(int threads, int64_t chunks, const void* body, ChunkFunction function, const Meanwhile& meanwhile);
    void start_workers(int wanted);
    void work(int participant);
    void worker_main(int participant);
    uint64_t wait_for_job(uint64_t seen, bool spin);

    std::mutex busy_;  // held by the caller of the job in progress
    std::atomic<int> workers_{0};
    std::atomic<int64_t> last_end_{0};  // of a job, in nanoseconds of the steady clock

    std::unique_ptr<Share[]> shares_;
    int share_capacity_ = 0;
    int threads_ = 0;
    bool backward_ = false;
    const void* body_ = nullptr;
    ChunkFunction function_ = nullptr;

    // epoch << 32 | open << 31 | workers inside. A worker enters by adding one while the job is open; the
    // caller closes the job and waits for those inside, so a job never outlives its caller's frame.
    alignas(64) std::atomic<uint64_t> state_{0};
    alignas(64) std::atomic<int> parked_{0};
    std::mutex parking_;
    std::condition_variable unpark_;
};

// The number of threads that a step uses at most; see thread_count.hpp for its default.
int num_threads();
const char* num_threads_reason();
void set_num_threads(int count);

}  // namespace fusedstep::cpu
