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

template <class Hyper>
FUSEDSTEP_INLINE void begin_step(const GroupOnGpu<Hyper>& group) {
    if (group.norm != nullptr && group.norm->skipped) return;
    if (group.taken_back) {
        --group.state->step;
        return;
    }
    Hyper hyper = group.hyper;
    if (group.lr != nullptr) {
        hyper.lr = group.lr_dtype == DType::float32 ? *static_cast<const float*>(group.lr)
                                                    : *static_cast<const double*>(group.lr);
    }
    ++group.state->step;
    group.state->random = random_stream(group.seed, group.state->step);
    compute_scalars(hyper, *group.state);
}

}  // namespace fusedstep::cuda
