// One call's work while it is being checked, and then its run: tensors sorted into a job per rule and type,
// each with the scalars of its step.
#pragma once

#include <deque>
#include <tuple>
#include <vector>

#include "../core/job.hpp"
#include "../cpu/dispatch.hpp"
#include "../cpu/float_environment.hpp"
#include "../cpu/run.hpp"
#include "../cpu/thread_pool.hpp"
#include "boundary.hpp"
#include "gpu_arrays.hpp"
#include "hyper_reader.hpp"

namespace fusedstep {

// Keeps its memory from call to call, so that a step allocates nothing once it has been taken before.
class StepCall {
public:
    StepStores stores;
    std::vector<Extent> extents;
    GpuArrays gpu_arrays;
    Placement placement;

    void clear() {
        if (gpu_arrays.in_use()) clear_gpu();
        placement.clear();
        stores.clear();
        extents.clear();
        scalars_used_ = 0;
        known_[0] = known_[1] = {};
        for (auto& row : work_) {
            for (Work& work : row) {
                work.tensors.clear();
                work.ends.clear();
            }
        }
    }

    // The groups whose steps are counted on the GPU: all of the call's, or none.
    template <class Hyper>
    std::vector<GroupOnGpu<Hyper>>& groups() {
        return std::get<std::vector<GroupOnGpu<Hyper>>>(groups_);
    }

    // New hyper-parameters: scalars are not shared with those before.
    void next_hyper() { known_[0] = known_[1] = {}; }

    template <class Hyper>
    const void* scalars_of(const Hyper& hyper, int64_t step, DType dtype) {
        Known& known = known_[static_cast<int>(dtype)];
        if (known.step != step) {
            known.scalars =
                dtype == DType::float32 ? new_scalars<float>(hyper, step) : new_scalars<double>(hyper, step);
            known.step = step;
        }
        return known.scalars;
    }

    Tensor& add(int rule, DType dtype, const Tensor& tensor) {
        Work& work = work_[rule][static_cast<int>(dtype)];
        work.ends.push_back((work.ends.empty() ? 0 : work.ends.back()) + tensor.size);
        return work.tensors.emplace_back(tensor);
    }

    // The settings it needs are read first: if the environment names nonsense, nothing has been written.
    void run() const {
        if (placement.device() >= 0) {
            run_on_gpu();
            return;
        }
        cpu::chosen_isa();
        cpu::num_threads();
        if (cpu::is_long(bytes())) {
            const py::gil_scoped_release release;
            run_jobs();
        } else {
            run_jobs();
        }
    }

private:
    struct Work {
        std::vector<Tensor> tensors;
        std::vector<int64_t> ends;
    };

    struct Known {
        int64_t step = 0;
        const void* scalars = nullptr;
    };

    union AnyScalars {
        GdScalars<float> gd32;
        GdScalars<double> gd64;
        AdamScalars<float> adam32;
        AdamScalars<double> adam64;
    };

    template <class T, class Hyper>
    const void* new_scalars(const Hyper& hyper, int64_t step) {
        const cpu::FloatEnvironment ieee;
        if (scalars_used_ == scalars_.size()) scalars_.emplace_back();
        const auto computed = scalars<T>(hyper, step);
        check_scalars(hyper, computed);
        return new (&scalars_[scalars_used_++]) auto(computed);
    }

    template <class Visit>
    void for_each_job(Visit visit) const {
        for (int rule = 0; rule < Rules::count; ++rule) {
            for (int dtype = 0; dtype < dtype_count; ++dtype) {
                const Work& work = work_[rule][dtype];
                if (work.tensors.empty()) continue;
                visit(Job{rule, static_cast<DType>(dtype), work.tensors.data(), work.ends.data(),
                          static_cast<int64_t>(work.tensors.size()), false});
            }
        }
    }

    [[gnu::noinline]] void clear_gpu() {
        gpu_arrays.clear();
        groups<GdHyper>().clear();
        groups<AdamHyper>().clear();
    }

    [[gnu::noinline]] void run_on_gpu() const {
        // A launch can wait for room in the GPU's queue.
        const py::gil_scoped_release release;
        const GpuBackend& gpu = gpu_arrays.backend();
        const int device = placement.device();
        void* const stream = gpu_arrays.stream();
        // All of them before the first launch: if one cannot be loaded, for want of memory say, nothing has been done.
        for_each_job([&](const Job& job) { gpu.load(job.rule, job.dtype, device); });
        const auto& [gd_groups, adam_groups] = groups_;
        for (const auto& group : gd_groups) gpu.begin_gd_step(group, device, stream);
        for (const auto& group : adam_groups) gpu.begin_adam_step(group, device, stream);
        const bool scalars_on_gpu = !gd_groups.empty() || !adam_groups.empty();
        for_each_job([&](Job job) {
            job.scalars_on_gpu = scalars_on_gpu;
            gpu.launch(job, device, stream);
        });
    }

    int64_t bytes() const {
        int64_t bytes = 0;
        for_each_job([&](const Job& job) { bytes += job.bytes(); });
        return bytes;
    }

    void run_jobs() const {
        for_each_job([](const Job& job) { cpu::run(job); });
    }

    std::tuple<std::vector<GroupOnGpu<GdHyper>>, std::vector<GroupOnGpu<AdamHyper>>> groups_;
    Work work_[Rules::count][dtype_count];
    Known known_[dtype_count];
    std::deque<AnyScalars> scalars_;
    size_t scalars_used_ = 0;
};

}  // namespace fusedstep
