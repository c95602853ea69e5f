#include "hyper.hpp"

#include <cmath>

namespace fusedstep {
namespace {

// A number as an unevaluated sum of two doubles, about 106 bits (Dekker 1971).
struct DoubleDouble {
    double high, low;
};

// Veltkamp's splitting rather than fma: the baseline build has no fma instruction.
void split(double a, double& high, double& low) {
    const double scaled = 134217729.0 * a;  // 2^27 + 1
    high = scaled - (scaled - a);
    low = a - high;
}

DoubleDouble multiply(DoubleDouble a, DoubleDouble b) {
    double a1, a2, b1, b2;
    split(a.high, a1, a2);
    split(b.high, b1, b2);
    const double product = a.high * b.high;
    const double error = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2;
    const double tail = error + (a.high * b.low + a.low * b.high);
    const double high = product + tail;
    return {high, tail - (high - product)};
}

}  // namespace

double one_minus_power(double base, int64_t exponent) {
    DoubleDouble power{1.0, 0.0};
    DoubleDouble square{base, 0.0};
    for (;;) {
        if (exponent & 1) power = multiply(power, square);
        exponent >>= 1;
        // Below 1e-40 a power no longer changes 1 - power; stopping also keeps clear of denormals.
        if (exponent == 0 || power.high < 1e-40) break;
        if (square.high < 1e-40) return 1.0;
        square = multiply(square, square);
    }
    return (1.0 - power.high) - power.low;
}

template <class T>
GdScalars<T> scalars(const GdHyper& hyper, int64_t step) {
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

template <class T>
AdamScalars<T> scalars(const AdamHyper& hyper, int64_t step) {
    const double correction1 = hyper.bias_correction ? one_minus_power(hyper.beta1, step) : 1.0;
    const double correction2 = hyper.bias_correction ? one_minus_power(hyper.beta2, step) : 1.0;
    AdamScalars<T> s;
    s.grad_scale = static_cast<T>(hyper.maximize ? -hyper.grad_scale : hyper.grad_scale);
    s.weight_decay = static_cast<T>(hyper.decoupled ? 0.0 : hyper.weight_decay);
    s.param_decay = static_cast<T>(hyper.decoupled ? 1.0 - hyper.lr * hyper.weight_decay : 1.0);
    s.one_minus_beta1 = static_cast<T>(1.0 - hyper.beta1);
    s.beta2 = static_cast<T>(hyper.beta2);
    s.one_minus_beta2 = static_cast<T>(1.0 - hyper.beta2);
    s.inv_sqrt_correction = static_cast<T>(1.0 / std::sqrt(correction2));
    s.eps = static_cast<T>(hyper.eps);
    s.neg_step_size = static_cast<T>(-hyper.lr / correction1);
    return s;
}

template GdScalars<float> scalars<float>(const GdHyper&, int64_t);
template GdScalars<double> scalars<double>(const GdHyper&, int64_t);
template AdamScalars<float> scalars<float>(const AdamHyper&, int64_t);
template AdamScalars<double> scalars<double>(const AdamHyper&, int64_t);

}  // namespace fusedstep
