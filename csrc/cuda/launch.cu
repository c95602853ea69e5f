#include "launch.hpp"

#include <cuda_runtime.h>

#include <atomic>

#include "device.hpp"
#include "group_step.cuh"
#include "launch_stored.hpp"
#include "step_launch.cuh"

namespace fusedstep::cuda {
namespace {

template <class Hyper>
__global__ void begin_step_kernel(const GroupOnGpu<Hyper> group) {
    begin_step(group);
}

template <class Rule, class T>
void launch_typed(const Job& job, int device, cudaStream_t stream) {
    launch_placed<Rule, T, Dense>(job, device, stream);
    launch_placed<Rule, T, Strided>(job, device, stream);
}

template <class Rule, class T>
void load_typed(int device) {
    load_placed<Rule, T, Dense>(device);
    load_placed<Rule, T, Strided>(device);
}

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
    launch_kernel(begin_step_function<Hyper>(), 1, 1, group, static_cast<cudaStream_t>(stream));
}

}  // namespace

void launch(const Job& job, int device, void* stream) {
    if (job.elements() == 0) return;
    const DeviceGuard guard(device);
    const auto queue = static_cast<cudaStream_t>(stream);
    functions_in(Rules{}, job.rule, job.dtype).launch(job, device, queue);
    if (job.any_stored) launch_stored(job, device, queue);
}

void begin_gd_step(const GroupOnGpu<GdHyper>& group, int device, void* stream) {
    launch_begin_step(group, device, stream);
}

void begin_adam_step(const GroupOnGpu<AdamHyper>& group, int device, void* stream) {
    launch_begin_step(group, device, stream);
}

void load(int rule, DType dtype, bool stored, int device) {
    static std::atomic<bool> loaded[Rules::count][dtype_count][2][most_cached_devices];
    std::atomic<bool>* const known =
        device < most_cached_devices ? &loaded[rule][static_cast<int>(dtype)][stored][device] : nullptr;
    if (known != nullptr && known->load(std::memory_order_relaxed)) return;
    const DeviceGuard guard(device);
    functions_in(Rules{}, rule, dtype).load(device);
    if (stored) load_stored(rule, device);
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
