// The beginning of a step of a group that is counted on the GPU: one thread counts it and computes its scalars,
// to the bits that the host would compute. As step_kernel.cuh, it compiles for the host too.
#pragma once

#include "../core/group_on_gpu.hpp"
#include "../formats/random.hpp"
#include "../rules/power.hpp"

namespace fusedstep::cuda {

FUSEDSTEP_INLINE double correction(const AdamHyper& hyper, double beta, int64_t step) {
    return hyper.bias_correction ? compute_one_minus_power(beta, step) : 1.0;
}

FUSEDSTEP_INLINE void compute_scalars(const GdHyper& hyper, GroupState<GdHyper>& state) {
    state.float32 = gd_scalars<float>(hyper, state.step);
    state.float64 = gd_scalars<double>(hyper, state.step);
}

FUSEDSTEP_INLINE void compute_scalars(const AdamHyper& hyper, GroupState<AdamHyper>& state) {
    const double correction1 = correction(hyper, hyper.beta1, state.step);
    const double correction2 = correction(hyper, hyper.beta2, state.step);
    state.float32 = adam_scalars<float>(hyper, correction1, correction2);
    state.float64 = adam_scalars<double>(hyper, correction1, correction2);
}

// A count may have been set where PyTorch keeps it. Beyond 2^24 a float32 no longer counts, but we do.
template <class Hyper>
FUSEDSTEP_INLINE int64_t steps_taken(const GroupOnGpu<Hyper>& group) {
    const int64_t step = group.state->step;
    if (group.counts == nullptr) return step;
    const float count = *group.counts;
    return count == static_cast<float>(step) || !(count >= 0 && count < 0x1p62f) ? step : static_cast<int64_t>(count);
}

template <class Hyper>
FUSEDSTEP_INLINE void count_step(const GroupOnGpu<Hyper>& group) {
    const int64_t step = steps_taken(group) + (group.taken_back ? -1 : 1);
    group.state->step = step;
    if (group.counts == nullptr) return;
    for (int64_t i = 0; i < group.parameters; ++i) group.counts[i] = static_cast<float>(step);
}

template <class Hyper>
FUSEDSTEP_INLINE void begin_step(const GroupOnGpu<Hyper>& group) {
    if (group.loss_scaling.any()) group.state->outcome = outcome_of(group.loss_scaling, group.hyper.grad_scale);
    if (group.norm != nullptr && group.norm->skipped) return;
    count_step(group);
    if (group.taken_back) return;
    Hyper hyper = group.hyper;
    if (group.lr != nullptr) {
        hyper.lr = group.lr_dtype == DType::float32 ? *static_cast<const float*>(group.lr)
                                                    : *static_cast<const double*>(group.lr);
    }
    group.state->random = random_stream(group.seed, group.state->step);
    compute_scalars(hyper, *group.state);
}

}  // namespace fusedstep::cuda
