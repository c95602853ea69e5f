// What a call does to its gradients on account of their norm.
#pragma once

#include <cmath>

#include "../rules/inline.hpp"

namespace fusedstep {

struct NormOptions {
    double grad_scale;
    double clip_norm;  // 0: none
    bool skip_nonfinite;
};

// What became of a norm: with `skipped`, there is no step.
struct NormOutcome {
    double norm;
    double grad_scale;
    bool skipped;
};

// Clips as torch.nn.utils.clip_grad_norm_ does; a NaN stays one.
FUSEDSTEP_INLINE NormOutcome outcome_of(double sum_of_squares, const NormOptions& options) {
    NormOutcome outcome{options.grad_scale * std::sqrt(sum_of_squares), options.grad_scale, false};
    outcome.skipped = options.skip_nonfinite && !std::isfinite(outcome.norm);
    if (outcome.skipped || options.clip_norm == 0) return outcome;
    const double coefficient = options.clip_norm / (outcome.norm + 1e-6);
    outcome.grad_scale = options.grad_scale * (coefficient > 1 ? 1 : coefficient);
    return outcome;
}

}  // namespace fusedstep
