// One call's work while it is being checked, and then its run: tensors sorted into a job per rule and type,
// each with the scalars of its step.
#pragma once

#include <cmath>
#include <deque>
#include <exception>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <variant>
#include <vector>

#include "../core/job.hpp"
#include "../core/norm_job.hpp"
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

    // Of arrays on a GPU: where in its memory the norm is computed, and where to. There is an outcome as well where a
    // loss scaler has decided.
    double* norm_workspace = nullptr;
    NormOutcome* norm_outcome = nullptr;

    bool needs_norm() const { return clip_norm.has_value() || skip_nonfinite; }
    NormOptions norm_options() const { return {grad_scale, clip_norm.value_or(0), skip_nonfinite}; }
};

struct StepOutcome {
    std::optional<double> grad_norm;
    bool skipped = false;
    bool on_gpu = false;  // it is there that they will be known
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
                work.any_stored = false;
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
        work.any_stored = work.any_stored || tensor.storage != nullptr;
        return work.tensors.emplace_back(tensor);
    }

    // The settings it needs are read first: if the environment names nonsense, nothing has been written.
    StepOutcome run(const GradientOptions& options = {}) {
        if (placement.device() >= 0) {
            run_on_gpu(options);
            return {{}, false, options.needs_norm()};
        }
        return on_cpu(bytes(), [&] { return run_jobs(options); });
    }

    // Of a job whose tensors the caller keeps, in host memory. `meanwhile` has the GIL.
    void run(const Job& job, const cpu::Meanwhile& meanwhile = nullptr) {
        const bool has_gil = !cpu::is_long(job.bytes());
        on_cpu(job.bytes(), [&] { cpu::run(job, has_gil ? meanwhile : nullptr); });
        if (meanwhile && !has_gil) meanwhile();
    }

private:
    template <class Run>
    static std::invoke_result_t<Run> on_cpu(int64_t bytes, const Run& run) {
        cpu::chosen_isa();
        cpu::num_threads();
        if (cpu::is_long(bytes)) {
            const py::gil_scoped_release release;
            return run();
        }
        return run();
    }

    struct Work {
        std::vector<Tensor> tensors;
        std::vector<int64_t> ends;
        bool any_stored = false;
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
                          static_cast<int64_t>(work.tensors.size()), false, work.any_stored});
            }
        }
    }

    [[gnu::noinline]] void clear_gpu() {
        gpu_arrays.clear();
        groups<GdHyper>().clear();
        groups<AdamHyper>().clear();
    }

    [[gnu::noinline]] void run_on_gpu(const GradientOptions& options) {
        // A launch can wait for room in the GPU's queue.
        const py::gil_scoped_release release;
        const GpuBackend& gpu = gpu_arrays.backend();
        const int device = placement.device();
        void* const stream = gpu_arrays.stream();
        // All of them before the first launch: if one cannot be loaded, for want of memory say, nothing has been done.
        for_each_job([&](const Job& job) { gpu.load(job.rule, job.dtype, job.any_stored, device); });
        const NormOutcome* const norm = options.norm_outcome;
        if (norm != nullptr && options.needs_norm()) {
            gpu.load_norm(device);
            gradients_.clear();
            for_each_gradient([&](const Tensor& tensor, DType dtype) { gradients_.push_back({&tensor, dtype}); });
            gpu.norm({gradients_.data(), static_cast<int64_t>(gradients_.size()), options.norm_workspace,
                      options.norm_outcome, options.norm_options()},
                     device, stream);
        }
        CountedSteps counted(*this, norm);
        counted.begin();
        for_each_job([&](Job job) {
            job.scalars_on_gpu = counted.any();
            job.zero_grad = options.zero_grad;
            job.norm = norm;
            gpu.launch(job, device, stream);
        });
        counted.keep();
    }

    // The steps of groups that are counted on the GPU; taken back there, unless kept: a launch can fail.
    class CountedSteps {
    public:
        CountedSteps(StepCall& call, const NormOutcome* norm) : call_(call) {
            for_each_group([&](auto& group, auto) { group.norm = norm; });
        }
        CountedSteps(const CountedSteps&) = delete;
        CountedSteps& operator=(const CountedSteps&) = delete;
        ~CountedSteps() {
            try {
                for_each_group([&](auto& group, auto begin_step) {
                    if (begun_ == 0) return;
                    --begun_;
                    group.taken_back = true;
                    begin_step(group, call_.placement.device(), call_.gpu_arrays.stream());
                });
            } catch (const std::exception&) {  // the GPU takes no more work, and what it holds is lost
            }
        }

        bool any() const { return begun_ != 0; }
        void begin() {
            for_each_group([&](auto& group, auto begin_step) {
                begin_step(group, call_.placement.device(), call_.gpu_arrays.stream());
                ++begun_;
            });
        }
        void keep() { begun_ = 0; }

    private:
        template <class Visit>
        void for_each_group(Visit visit) const {
            const GpuBackend& gpu = call_.gpu_arrays.backend();
            for (auto& group : call_.groups<GdHyper>()) visit(group, gpu.begin_gd_step);
            for (auto& group : call_.groups<AdamHyper>()) visit(group, gpu.begin_adam_step);
        }

        StepCall& call_;
        size_t begun_ = 0;  // groups, in this order
    };

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
        norm_.clear();
        for_each_gradient([&](const Tensor& tensor, DType dtype) { norm_.add(tensor, dtype); });
        const NormOutcome norm = outcome_of(norm_.sum_of_squares(), options.norm_options());
        outcome.grad_norm = norm.norm;
        outcome.skipped = norm.skipped;
        if (options.clip_norm.has_value()) set_grad_scale(norm.grad_scale);
    }

    // In the order in which the norm is summed.
    template <class Visit>
    void for_each_gradient(Visit visit) const {
        size_t next[Rules::count][dtype_count] = {};
        for (const Kind& kind : order) {
            const int dtype = static_cast<int>(kind.dtype);
            visit(work_[kind.rule][dtype].tensors[next[kind.rule][dtype]++], kind.dtype);
        }
    }

    // In all scalars of the call, whose signs say which way to go.
    void set_grad_scale(double scale) {
        // It may have come of any gradient, but only a NaN that is a bfloat16 is rounded to a NaN without care.
        if (std::isnan(scale)) scale = std::numeric_limits<double>::quiet_NaN();
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
    std::vector<NormJob::Gradient> gradients_;  // of a norm on a GPU
};

}  // namespace fusedstep
