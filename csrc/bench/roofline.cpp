// The extension fusedstep._roofline: how fast this machine can move the streams of an optimizer step.
//
// It shares no code with the library: its own loop, its own threads, a static partition. Up to four arrays
// are read and written in place and one is only read, all in one pass, with one integer addition per word
// written so that no read can be dropped. A step cannot be faster than this at sizes beyond the caches.
// Plain stores are used because lines that were just read are not fetched again for a store; non-temporal
// stores measured slower in place. Of plain and prefetching loops the caller keeps the faster.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace py = pybind11;

namespace {

constexpr int most_written = 4;
constexpr int64_t line_words = 8;  // a cache line in 64-bit words
constexpr int64_t prefetch_lines = 16;

struct Streams {
    uint64_t* written[most_written];
    const uint64_t* read;
    int writes;
    int64_t words;  // of each array
};

template <int Writes, bool Prefetch>
ALWAYS_INLINE void pass(const Streams& streams, int64_t begin, int64_t end) {
    uint64_t* written[Writes];
    const uint64_t* const read = streams.read;
    for (int k = 0; k < Writes; ++k) written[k] = streams.written[k];
    for (int64_t line = begin; line < end; line += line_words) {
        if (Prefetch) {
            for (int k = 0; k < Writes; ++k) __builtin_prefetch(written[k] + line + prefetch_lines * line_words);
            __builtin_prefetch(read + line + prefetch_lines * line_words);
        }
        uint64_t addend[line_words];
        for (int i = 0; i < line_words; ++i) addend[i] = read[line + i];
        for (int k = 0; k < Writes; ++k) {
            for (int i = 0; i < line_words; ++i) written[k][line + i] += addend[i];
        }
    }
}

template <bool Prefetch>
ALWAYS_INLINE void dispatch(const Streams& streams, int64_t begin, int64_t end) {
    switch (streams.writes) {
        case 1:
            return pass<1, Prefetch>(streams, begin, end);
        case 2:
            return pass<2, Prefetch>(streams, begin, end);
        case 3:
            return pass<3, Prefetch>(streams, begin, end);
        default:
            return pass<4, Prefetch>(streams, begin, end);
    }
}

ALWAYS_INLINE void move(const Streams& streams, int64_t begin, int64_t end, bool prefetch) {
    prefetch ? dispatch<true>(streams, begin, end) : dispatch<false>(streams, begin, end);
}

using Mover = void (*)(const Streams&, int64_t begin, int64_t end, bool prefetch);

void move_baseline(const Streams& streams, int64_t begin, int64_t end, bool prefetch) {
    move(streams, begin, end, prefetch);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void move_avx2(const Streams& streams, int64_t begin, int64_t end, bool prefetch) {
    move(streams, begin, end, prefetch);
}

__attribute__((target("avx512f"))) void move_avx512(const Streams& streams, int64_t begin, int64_t end, bool prefetch) {
    move(streams, begin, end, prefetch);
}
#endif

Mover best_mover() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return move_avx512;
    if (__builtin_cpu_supports("avx2")) return move_avx2;
#endif
    return move_baseline;
}

// Waits until all threads have come; a round number tells one meeting from the next.
class Barrier {
public:
    explicit Barrier(int threads) : threads_(threads) {}

    void meet() {
        const int round = round_.load();
        if (come_.fetch_add(1) + 1 == threads_) {
            come_.store(0);
            round_.store(round + 1);
        } else {
            while (round_.load() == round) {
            }
        }
    }

private:
    const int threads_;
    std::atomic<int> come_{0};
    std::atomic<int> round_{0};
};

std::vector<double> timed_passes(const Streams& streams, int threads, int repeats, bool prefetch) {
    const Mover mover = best_mover();
    const int64_t lines = streams.words / line_words;
    std::vector<double> seconds;
    Barrier barrier(threads);
    const auto work = [&](int thread) {
        const int64_t begin = lines * thread / threads * line_words;
        const int64_t end = lines * (thread + 1) / threads * line_words;
        for (int i = 0; i < repeats; ++i) {
            barrier.meet();
            const auto start = std::chrono::steady_clock::now();
            mover(streams, begin, end, prefetch);
            barrier.meet();
            if (thread == 0) {
                seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
            }
        }
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
    work(0);
    for (std::thread& other : others) other.join();
    return seconds;
}

// Whole cache lines of an array's memory.
uint64_t* memory_of(py::handle array, bool writable, int64_t& words) {
    const auto checked = py::reinterpret_borrow<py::array>(array);
    if (!py::isinstance<py::array>(array) || (checked.flags() & py::array::c_style) == 0) {
        throw py::type_error("expected C-contiguous NumPy arrays");
    }
    if (writable && !checked.writeable()) throw py::value_error("written: an array is read-only");
    const int64_t here = checked.nbytes() / (line_words * 8) * line_words;
    if (words != -1 && words != here) throw py::value_error("the arrays must have equal sizes");
    words = here;
    return static_cast<uint64_t*>(const_cast<void*>(checked.data()));
}

std::vector<double> run(const py::list& written, const py::array& read, int num_threads, int repeats, bool prefetch) {
    if (written.empty() || written.size() > most_written) throw py::value_error("written: expected 1 to 4 arrays");
    if (num_threads < 1 || repeats < 1) throw py::value_error("num_threads and repeats: expected at least 1");
    Streams streams{};
    streams.words = -1;
    for (const py::handle array : written) {
        streams.written[streams.writes++] = memory_of(array, true, streams.words);
    }
    streams.read = memory_of(read, false, streams.words);
    const py::gil_scoped_release release;
    return timed_passes(streams, num_threads, repeats, prefetch);
}

}  // namespace

PYBIND11_MODULE(_roofline, module, py::mod_gil_not_used()) {
    module.doc() = "How fast this machine moves the streams of an optimizer step.";
    module.def("run", &run, py::arg("written"), py::arg("read"), py::arg("num_threads"), py::arg("repeats"),
               py::arg("prefetch") = false,
               "Time passes that read and write each array of `written` in place (1 to 4 of them) and read `read`.\n\n"
               "The arrays are C-contiguous and of equal size; their content becomes meaningless. Returns the\n"
               "seconds of each pass.");
}
