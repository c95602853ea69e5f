// Hyper-parameters as a user gives them, and the scalars a step needs, each computed once in double from
// the step's number and rounded once. Nothing is carried from one step to the next.
#pragma once

#include <cstdint>

#include "adam.hpp"
#include "gd.hpp"

namespace fusedstep {

struct GdHyper {
    double lr, momentum, dampening, weight_decay, grad_scale;
    bool nesterov, maximize;
};

struct AdamHyper {
    double lr, beta1, beta2, eps, weight_decay, grad_scale;
    bool decoupled, bias_correction, maximize;
};

// 1 - base^exponent for a base in [0, 1), right to the last bits of a double and the same on every
// platform (libm's pow is neither).
double one_minus_power(double base, int64_t exponent);

template <class T>
GdScalars<T> scalars(const GdHyper& hyper, int64_t step);

template <class T>
AdamScalars<T> scalars(const AdamHyper& hyper, int64_t step);

}  // namespace fusedstep
