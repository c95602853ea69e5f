// The CUDA kernels' own source, run on the host: a GpuBackend whose "GPU" is a loop over the threads of a
// grid and whose "device memory" is the host's. What it was asked for last can be read back.
#include "../../csrc/cuda/backend.hpp"
#include "../../csrc/cuda/group_step.cuh"
#include "../../csrc/cuda/norm_kernel.cuh"
#include "../../csrc/cuda/step_kernel.cuh"

#include <algorithm>
#include <stdexcept>

namespace fusedstep {
namespace {

constexpr int threads = 256;

struct Launches {
    int64_t count = 0, small = 0, begun = 0, loaded = 0, norms = 0;
    int device = -1;
    void* stream = nullptr;
};

Launches launches;
uint32_t most_blocks = 3;
int device_of_pointers = 0;
int refused_dtype = -1;        // whose kernels cannot be loaded
bool norm_is_refused = false;  // whether the norm's cannot
int launches_to_failure = -1;  // how many more succeed; -1: all

void launch_or_fail() {
    if (launches_to_failure >= 0 && launches_to_failure-- == 0) throw std::runtime_error("CUDA: launch failed");
}

template <class Rule, class T, class Placing, class Table>
void run_grid(const Table& table) {
    const uint32_t blocks = std::min(table.chunks, most_blocks);
    for (uint32_t block = 0; block < blocks; ++block) {
        for (int thread = 0; thread < threads; ++thread) {
            cuda::step_table<Rule, T, Placing>(table, {block, blocks, thread, threads}, cuda::Alone{});
        }
    }
    ++launches.count;
    launches.small += __is_same(Table, cuda::SmallTable);
}

template <class Rule, class T>
void run(const Job& job) {
    cuda::for_each_table<Rule, T, cuda::Dense>(job, [](const auto& table) { run_grid<Rule, T, cuda::Dense>(table); });
    cuda::for_each_table<Rule, T, cuda::Strided>(job,
                                                 [](const auto& table) { run_grid<Rule, T, cuda::Strided>(table); });
    if constexpr (sizeof(T) == sizeof(float)) {
        cuda::for_each_stored_placing(typename cuda::FastPlacings<Rule>::List{}, [&](auto placing) {
            using Placing = decltype(placing);
            cuda::for_each_table<Rule, T, Placing>(job, [](const auto& table) { run_grid<Rule, T, Placing>(table); });
        });
    }
}

template <class... All>
void run_rule(RuleList<All...>, const Job& job) {
    using Run = void (*)(const Job&);
    static constexpr Run runs[][dtype_count] = {{run<All, float>, run<All, double>}...};
    runs[job.rule][static_cast<int>(job.dtype)](job);
}

void launch(const Job& job, int device, void* stream) {
    launch_or_fail();
    launches.device = device;
    launches.stream = stream;
    run_rule(Rules{}, job);
}

template <class Hyper>
void begin_step(const GroupOnGpu<Hyper>& group, int device, void* stream) {
    launch_or_fail();
    launches.device = device;
    launches.stream = stream;
    ++launches.begun;
    cuda::begin_step(group);
}

// Threads that work alone never wait for each other, so that there can be but one where a kernel waits for its block.
void norm(const NormJob& job, int device, void* stream) {
    launches.device = device;
    launches.stream = stream;
    ++launches.norms;
    const int64_t gradients = cuda::for_each_norm_table(job, [](const auto& table) {
        for (uint32_t block = 0; block < most_blocks; ++block) {
            for (int thread = 0; thread < 4; ++thread)
                cuda::sum_blocks(table, {block, most_blocks, thread, 4}, cuda::Alone{});
        }
        for (uint32_t block = 0; block < most_blocks; ++block)
            cuda::sum_gradients(table, {block, most_blocks, 0, 1}, cuda::Alone{});
    });
    cuda::end_norm({job.workspace, gradients, job.outcome, job.options}, {0, 1, 0, 1}, cuda::Alone{});
}

void load(int, DType dtype, bool, int) {
    if (static_cast<int>(dtype) == refused_dtype) throw std::runtime_error("CUDA: out of memory");
    ++launches.loaded;
}

void load_norm(int) {
    if (norm_is_refused) throw std::runtime_error("CUDA: out of memory");
    ++launches.loaded;
}

int device_of(const void*) { return device_of_pointers; }

constexpr GpuBackend backend{FUSEDSTEP_VERSION, launch,   begin_step<GdHyper>, begin_step<AdamHyper>, norm, load,
                             load_norm,         device_of};

}  // namespace
}  // namespace fusedstep

extern "C" {
const void* get_backend() { return &fusedstep::backend; }
int64_t launch_count() { return fusedstep::launches.count; }
int64_t small_launch_count() { return fusedstep::launches.small; }
int64_t begun_count() { return fusedstep::launches.begun; }
int64_t loaded_count() { return fusedstep::launches.loaded; }
int64_t norm_count() { return fusedstep::launches.norms; }
int last_device() { return fusedstep::launches.device; }
uint64_t last_stream() { return reinterpret_cast<uint64_t>(fusedstep::launches.stream); }
void set_most_blocks(unsigned blocks) { fusedstep::most_blocks = blocks; }
void set_refused_dtype(int dtype) { fusedstep::refused_dtype = dtype; }
void set_launches_to_failure(int launches) { fusedstep::launches_to_failure = launches; }
void set_norm_is_refused(int refused) { fusedstep::norm_is_refused = refused != 0; }
void set_device_of_pointers(int device) { fusedstep::device_of_pointers = device; }
}
