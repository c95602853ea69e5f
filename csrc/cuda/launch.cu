#include "launch.hpp"

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "error.hpp"
#include "group_step.cuh"
#include "step_kernel.cuh"

namespace fusedstep::cuda {
namespace {

constexpr int block_threads = 256;
constexpr int most_cached_devices = 64;

template <class Rule, class T, class Placing, class Table>
__global__ void __launch_bounds__(block_threads) step_kernel(const __grid_constant__ Table table) {
    step_table<Rule, T, Placing>(table,
                                 {blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)});
}

template <class Hyper>
__global__ void begin_step_kernel(const GroupOnGpu<Hyper> group) {
    begin_step(group);
}

// Makes a device's context current to the calling thread, and what was current before again at the end.
// cudaSetDevice cannot do the latter: a thread may have had no context at all, and to set device 0 for it
// would make one there.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        // A driver that has not been used yet refuses to say; there is no context then.
        if (Driver::instance().get(&before_) != CUDA_SUCCESS) before_ = nullptr;
        check(cudaSetDevice(device));
    }
    ~DeviceGuard() { Driver::instance().set(before_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    struct Driver {
        CUresult (*get)(CUcontext*);
        CUresult (*set)(CUcontext);

        static const Driver& instance() {
            static const Driver driver;
            return driver;
        }

        Driver() {
            check_driver();
            find("cuCtxGetCurrent", get);
            find("cuCtxSetCurrent", set);
        }

        template <class Function>
        static void find(const char* name, Function& function) {
            void* address = nullptr;
            cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
            check(cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &found));
#else
            check(cudaGetDriverEntryPoint(name, &address, cudaEnableDefault, &found));
#endif
            if (found != cudaDriverEntryPointSuccess) check(cudaErrorInsufficientDriver);
            function = reinterpret_cast<Function>(address);
        }
    };

    CUcontext before_ = nullptr;
};

// How many blocks of a kernel the current device runs at a time.
int resident_blocks(const void* kernel, int device) {
    int processors = 0, blocks = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, block_threads, 0));
    return processors * std::max(blocks, 1);
}

// One kernel, and how large its grid may be on each device. To find that out loads it there.
template <class Rule, class T, class Placing, class Table>
struct Kernel {
    static const void* function() { return reinterpret_cast<const void*>(&step_kernel<Rule, T, Placing, Table>); }

    static int most_blocks(int device) {
        static std::atomic<int> known[most_cached_devices];
        if (device >= most_cached_devices) return resident_blocks(function(), device);
        int blocks = known[device].load(std::memory_order_relaxed);
        if (blocks == 0) {
            blocks = resident_blocks(function(), device);
            known[device].store(blocks, std::memory_order_relaxed);
        }
        return blocks;
    }

    static void launch(const Table& table, int device, cudaStream_t stream) {
        const unsigned grid = std::min<unsigned>(table.chunks, most_blocks(device));
        void* arguments[] = {const_cast<Table*>(&table)};
        check(cudaLaunchKernel(function(), grid, block_threads, arguments, 0, stream));
    }
};

template <class Rule, class T, class Placing>
void launch_placed(const Job& job, int device, cudaStream_t stream) {
    for_each_table<Rule, T, Placing>(job, [&](const auto& table) {
        Kernel<Rule, T, Placing, std::decay_t<decltype(table)>>::launch(table, device, stream);
    });
}

template <class Rule, class T>
void launch_typed(const Job& job, int device, cudaStream_t stream) {
    launch_placed<Rule, T, Dense>(job, device, stream);
    launch_placed<Rule, T, Strided>(job, device, stream);
}

template <class Rule, class T>
void load_typed(int device) {
    Kernel<Rule, T, Dense, SmallTable>::most_blocks(device);
    Kernel<Rule, T, Dense, LargeTable>::most_blocks(device);
    Kernel<Rule, T, Strided, SmallTable>::most_blocks(device);
    Kernel<Rule, T, Strided, LargeTable>::most_blocks(device);
}

struct RuleFunctions {
    void (*launch)(const Job&, int, cudaStream_t);
    void (*load)(int);
};

template <class... All>
const RuleFunctions& functions_in(RuleList<All...>, int rule, DType dtype) {
    static constexpr RuleFunctions functions[][dtype_count] = {
        {{launch_typed<All, float>, load_typed<All, float>}, {launch_typed<All, double>, load_typed<All, double>}}...};
    return functions[rule][static_cast<int>(dtype)];
}

template <class Hyper>
const void* begin_step_function() {
    return reinterpret_cast<const void*>(&begin_step_kernel<Hyper>);
}

template <class Hyper>
void load_begin_step() {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, begin_step_function<Hyper>()));
}

template <class Hyper>
void launch_begin_step(const GroupOnGpu<Hyper>& group, int device, void* stream) {
    const DeviceGuard guard(device);
    void* arguments[] = {const_cast<GroupOnGpu<Hyper>*>(&group)};
    check(cudaLaunchKernel(begin_step_function<Hyper>(), 1, 1, arguments, 0, static_cast<cudaStream_t>(stream)));
}

}  // namespace

void launch(const Job& job, int device, void* stream) {
    if (job.elements() == 0) return;
    const DeviceGuard guard(device);
    functions_in(Rules{}, job.rule, job.dtype).launch(job, device, static_cast<cudaStream_t>(stream));
}

void begin_gd_step(const GroupOnGpu<GdHyper>& group, int device, void* stream) {
    launch_begin_step(group, device, stream);
}

void begin_adam_step(const GroupOnGpu<AdamHyper>& group, int device, void* stream) {
    launch_begin_step(group, device, stream);
}

void load(int rule, DType dtype, int device) {
    static std::atomic<bool> loaded[Rules::count][dtype_count][most_cached_devices];
    std::atomic<bool>* const known =
        device < most_cached_devices ? &loaded[rule][static_cast<int>(dtype)][device] : nullptr;
    if (known != nullptr && known->load(std::memory_order_relaxed)) return;
    const DeviceGuard guard(device);
    functions_in(Rules{}, rule, dtype).load(device);
    load_begin_step<GdHyper>();
    load_begin_step<AdamHyper>();
    if (known != nullptr) known->store(true, std::memory_order_relaxed);
}

int device_of(const void* pointer) {
    cudaPointerAttributes attributes;
    check(cudaPointerGetAttributes(&attributes, pointer));
    const bool is_on_gpu = attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
    return is_on_gpu ? attributes.device : -1;
}

}  // namespace fusedstep::cuda
