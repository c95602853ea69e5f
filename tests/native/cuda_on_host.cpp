// The CUDA kernels' own source, run on the host: a GpuBackend whose "GPU" is a loop over the threads of a
// grid and whose "device memory" is the host's. What it was asked for last can be read back.
#include "../../csrc/cuda/backend.hpp"
#include "../../csrc/cuda/group_step.cuh"
#include "../../csrc/cuda/step_kernel.cuh"

#include <algorithm>
#include <stdexcept>

namespace fusedstep {
namespace {

constexpr int threads = 256;

struct Launches {
    int64_t count = 0, small = 0, begun = 0, loaded = 0;
    int device = -1;
    void* stream = nullptr;
};

Launches launches;
uint32_t most_blocks = 3;
int device_of_pointers = 0;
int refused_dtype = -1;  // whose kernels cannot be loaded

template <class Rule, class T, class Placing, class Table>
void run_grid(const Table& table) {
    const uint32_t blocks = std::min(table.chunks, most_blocks);
    for (uint32_t block = 0; block < blocks; ++block) {
        for (int thread = 0; thread < threads; ++thread) {
            cuda::step_table<Rule, T, Placing>(table, {block, blocks, thread, threads});
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
}

template <class... All>
void run_rule(RuleList<All...>, const Job& job) {
    using Run = void (*)(const Job&);
    static constexpr Run runs[][dtype_count] = {{run<All, float>, run<All, double>}...};
    runs[job.rule][static_cast<int>(job.dtype)](job);
}

void launch(const Job& job, int device, void* stream) {
    launches.device = device;
    launches.stream = stream;
    run_rule(Rules{}, job);
}

template <class Hyper>
void begin_step(const GroupOnGpu<Hyper>& group, int device, void* stream) {
    launches.device = device;
    launches.stream = stream;
    ++launches.begun;
    cuda::begin_step(group);
}

void load(int, DType dtype, int) {
    if (static_cast<int>(dtype) == refused_dtype) throw std::runtime_error("CUDA: out of memory");
    ++launches.loaded;
}

int device_of(const void*) { return device_of_pointers; }

constexpr GpuBackend backend{FUSEDSTEP_VERSION, launch, begin_step<GdHyper>, begin_step<AdamHyper>, load, device_of};

}  // namespace
}  // namespace fusedstep

extern "C" {
const void* get_backend() { return &fusedstep::backend; }
int64_t launch_count() { return fusedstep::launches.count; }
int64_t small_launch_count() { return fusedstep::launches.small; }
int64_t begun_count() { return fusedstep::launches.begun; }
int64_t loaded_count() { return fusedstep::launches.loaded; }
int last_device() { return fusedstep::launches.device; }
uint64_t last_stream() { return reinterpret_cast<uint64_t>(fusedstep::launches.stream); }
void set_most_blocks(unsigned blocks) { fusedstep::most_blocks = blocks; }
void set_refused_dtype(int dtype) { fusedstep::refused_dtype = dtype; }
void set_device_of_pointers(int device) { fusedstep::device_of_pointers = device; }
}
