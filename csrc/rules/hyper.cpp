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

// base^exponent by repeated squaring.
DoubleDouble power_of(DoubleDouble square, int64_t exponent) {
    DoubleDouble power{1.0, 0.0};
    for (; exponent != 0; exponent >>= 1) {
        // Below 1e-40 a power no longer changes 1 - power; stopping also keeps clear of denormals.
        if (square.high < 1e-40) return {0.0, 0.0};
        if (exponent & 1) power = multiply(power, square);
        square = multiply(square, square);
    }
    return power;
}

// The powers of one base: base^t = (base^64)^(t / 64) * base^(t % 64), of which the factors are kept from
// step to step, so that the next step's power is one multiplication. Each factor is computed from the base
// alone, so a power does not depend on which others were asked for.
class Powers {
public:
    double base() const { return base_; }

    void start(double base) {
        base_ = base;
        DoubleDouble power{1.0, 0.0};
        for (DoubleDouble& low : low_) {
            low = power.high < 1e-40 ? DoubleDouble{0.0, 0.0} : power;
            power = multiply(low, {base, 0.0});
        }
        base_to_64_ = power;
        quotient_ = 0;
        high_ = {1.0, 0.0};
    }

    double one_minus(int64_t exponent) {
        if (exponent / 64 != quotient_) {
            quotient_ = exponent / 64;
            high_ = power_of(base_to_64_, quotient_);
        }
        if (high_.high < 1e-40) return 1.0;
        const DoubleDouble power = multiply(high_, low_[exponent % 64]);
        return (1.0 - power.high) - power.low;
    }

private:
    double base_ = -1.0;
    DoubleDouble base_to_64_{}, high_{}, low_[64] = {};
    int64_t quotient_ = 0;
};

}  // namespace

double one_minus_power(double base, int64_t exponent) {
    // The two bases that this thread used last.
    static thread_local Powers recent[2];
    static thread_local int oldest = 0;
    for (Powers& powers : recent) {
        if (powers.base() == base) return powers.one_minus(exponent);
    }
    Powers& powers = recent[oldest];
    oldest = 1 - oldest;
    powers.start(base);
    return powers.one_minus(exponent);
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
    s.moment_from_gradient = hyper.beta1 < 0.5;
    s.moment_weight = static_cast<T>(s.moment_from_gradient ? -hyper.beta1 : 1.0 - hyper.beta1);
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
