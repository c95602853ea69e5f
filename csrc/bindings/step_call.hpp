// One call's work while it is being checked, and then its run: tensors sorted into a job per rule and type,
// each with the scalars of its step.
#pragma once

#include <cmath>
#include <deque>
#include <optional>
#include <tuple>
#include <type_traits>
#include <variant>
#include <vector>

#include "../core/job.hpp"
#include "../cpu/dispatch.hpp"
#include "../cpu/float_environment.hpp"
#include "../cpu/norm.hpp"
#include "../cpu/run.hpp"
#include "../cpu/thread_pool.hpp"
#include "boundary.hpp"
#include "gpu_arrays.hpp"
#include "hyper_reader.hpp"

namespace fusedstep {

// What a call may do to its gradients beside the step.
struct GradientOptions {
    double grad_scale = 1;
    std::optional<double> clip_norm;
    bool skip_nonfinite = false;
    bool zero_grad = false;

    bool needs_norm() const { return clip_norm.has_value() || skip_nonfinite; }
    const char* first_given() const {
        return clip_norm.has_value() ? "clip_norm"
               : skip_nonfinite      ? "skip_nonfinite"
               : zero_grad           ? "zero_grad"
                                     : nullptr;
    }
};

struct StepOutcome {
    std::optional<double> grad_norm;
    bool skipped = false;
};

// Keeps its memory from call to call, so that a step allocates nothing once it has been taken before.
class StepCall {
public:
    StepStores stores;
    std::vector<Extent> extents;
    GpuArrays gpu_arrays;
    Placement placement;

    // The rule and type of each tensor in the order that they were added in, which the norm is summed in.
    struct Kind {
        int rule;
        DType dtype;
    };
    std::vector<Kind> order;

    void clear() {
        if (gpu_arrays.in_use()) clear_gpu();
        placement.clear();
        stores.clear();
        extents.clear();
        order.clear();
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
    StepOutcome run(const GradientOptions& options = {}) {
        if (placement.device() >= 0) {
            run_on_gpu();
            return {};
        }
        cpu::chosen_isa();
        cpu::num_threads();
        if (cpu::is_long(bytes())) {
            const py::gil_scoped_release release;
            return run_jobs(options);
        }
        return run_jobs(options);
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

    using AnyScalars = std::variant<GdScalars<float>, GdScalars<double>, AdamScalars<float>, AdamScalars<double>>;

    template <class T, class Hyper>
    const void* new_scalars(const Hyper& hyper, int64_t step) {
        const cpu::FloatEnvironment ieee;
        if (scalars_used_ == scalars_.size()) scalars_.emplace_back();
        const auto computed = scalars<T>(hyper, step);
        check_scalars(hyper, computed);
        return &scalars_[scalars_used_++].emplace<std::remove_const_t<decltype(computed)>>(computed);
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

    StepOutcome run_jobs(const GradientOptions& options) {
        StepOutcome outcome;
        if (options.needs_norm()) apply_norm(options, outcome);
        for_each_job([&](Job job) {
            job.zero_grad = options.zero_grad;
            if (!outcome.skipped)
                cpu::run(job);
            else if (job.zero_grad)
                cpu::zero_gradients(job);
        });
        return outcome;
    }

    // Takes the norm, and decides with it.
    void apply_norm(const GradientOptions& options, StepOutcome& outcome) {
        const cpu::FloatEnvironment ieee;
        const double norm = options.grad_scale * std::sqrt(sum_of_squares());
        outcome.grad_norm = norm;
        outcome.skipped = options.skip_nonfinite && !std::isfinite(norm);
        if (outcome.skipped || !options.clip_norm.has_value()) return;
        // As torch.nn.utils.clip_grad_norm_ has it; a NaN stays one.
        const double coefficient = *options.clip_norm / (norm + 1e-6);
        set_grad_scale(options.grad_scale * (coefficient > 1 ? 1 : coefficient));
    }

    double sum_of_squares() {
        norm_.clear();
        size_t next[Rules::count][dtype_count] = {};
        for (const Kind& kind : order) {
            const int dtype = static_cast<int>(kind.dtype);
            norm_.add(work_[kind.rule][dtype].tensors[next[kind.rule][dtype]++], kind.dtype);
        }
        return norm_.sum_of_squares();
    }

    // In all scalars of the call, whose signs say which way to go.
    void set_grad_scale(double scale) {
        for (size_t i = 0; i < scalars_used_; ++i) {
            std::visit(
                [scale](auto& scalars) {
                    using T = decltype(scalars.grad_scale);
                    scalars.grad_scale = std::copysign(static_cast<T>(scale), scalars.grad_scale);
                },
                scalars_[i]);
        }
    }

    std::tuple<std::vector<GroupOnGpu<GdHyper>>, std::vector<GroupOnGpu<AdamHyper>>> groups_;
    Work work_[Rules::count][dtype_count];
    Known known_[dtype_count];
    std::deque<AnyScalars> scalars_;
    size_t scalars_used_ = 0;
    cpu::GradientNorm norm_;
};

}  // namespace fusedstep
