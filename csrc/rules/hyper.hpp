// Hyper-parameters as a user gives them, and the scalars a step needs, each computed once in double from
// the step's number and rounded once. Nothing is carried from one step to the next.
#pragma once

#include <cmath>
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

template <class T>
FUSEDSTEP_INLINE GdScalars<T> gd_scalars(const GdHyper& hyper, int64_t step) {
    GdScalars<T> s;
    s.grad_scale = static_cast<T>(hyper.maximize ? -hyper.grad_scale : hyper.grad_scale);
    s.weight_decay = static_cast<T>(hyper.weight_decay);
    s.momentum = static_cast<T>(hyper.momentum);
    s.one_minus_dampening = static_cast<T>(1.0 - hyper.dampening);
    s.neg_lr = static_cast<T>(-hyper.lr);
    s.nesterov = hyper.nesterov;
    s.first = step == 1;
    return s;
}

// The corrections are 1 - beta1^t and 1 - beta2^t, or 1.
template <class T>
FUSEDSTEP_INLINE AdamScalars<T> adam_scalars(const AdamHyper& hyper, double correction1, double correction2) {
    AdamScalars<T> s;
    s.grad_scale = static_cast<T>(hyper.maximize ? -hyper.grad_scale : hyper.grad_scale);
    s.weight_decay = static_cast<T>(hyper.decoupled ? 0.0 : hyper.weight_decay);
    s.param_decay = static_cast<T>(hyper.decoupled ? 1.0 - hyper.lr * hyper.weight_decay : 1.0);
    s.moment_from_gradient = hyper.beta1 < 0.5;
    s.moment_weight = static_cast<T>(s.moment_from_gradient ? -hyper.beta1 : 1.0 - hyper.beta1);
    s.beta2 = static_cast<T>(hyper.beta2);
    s.one_minus_beta2 = static_cast<T>(1.0 - hyper.beta2);
    s.inv_sqrt_correction = static_cast<T>(1.0 / std::sqrt(correction2));
    s.eps = static_cast<T>(hyper.eps);
    s.neg_step_size = static_cast<T>(-hyper.lr / correction1);
    return s;
}

// 1 - base^exponent for a base in [0, 1), right to the last bits of a double and the same on every
// platform (libm's pow is neither).
double one_minus_power(double base, int64_t exponent);

template <class T>
GdScalars<T> scalars(const GdHyper& hyper, int64_t step);

template <class T>
AdamScalars<T> scalars(const AdamHyper& hyper, int64_t step);

}  // namespace fusedstep
