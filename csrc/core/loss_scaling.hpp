// What a loss scaler has left in a GPU's memory, for a step that reads it there and so does not wait for it.
#pragma once

#include "clipping.hpp"

namespace fusedstep {

struct LossScaling {
    const float* scale = nullptr;      // the gradients have been multiplied by it; null: by nothing
    const float* found_inf = nullptr;  // other than 0: one of them is not finite, and there is no step; null: there is

    FUSEDSTEP_INLINE bool any() const { return scale != nullptr || found_inf != nullptr; }
};

// What follows from it, as from a norm.
FUSEDSTEP_INLINE NormOutcome outcome_of(const LossScaling& scaling, double grad_scale) {
    NormOutcome outcome{0.0, grad_scale, false};
    if (scaling.scale != nullptr) outcome.grad_scale = grad_scale / *scaling.scale;
    outcome.skipped = scaling.found_inf != nullptr && *scaling.found_inf != 0;
    return outcome;
}

}  // namespace fusedstep
