#include "hyper.hpp"

#include "power.hpp"

namespace fusedstep {
namespace {

// The powers of one base, kept from step to step.
class Powers {
public:
    double base() const { return base_; }

    void start(double base) {
        base_ = base;
        period_ = power_of({base, 0.0}, power_period);
        for (DoubleDouble& low : low_) low.high = unknown;
        quotient_ = 0;
        high_ = {1.0, 0.0};
    }

    double one_minus(int64_t exponent) {
        if (exponent / power_period != quotient_) {
            quotient_ = exponent / power_period;
            high_ = power_of(period_, quotient_);
        }
        DoubleDouble& low = low_[exponent % power_period];
        if (low.high == unknown) low = power_of({base_, 0.0}, exponent % power_period);
        return one_minus_product(high_, low);
    }

private:
    static constexpr double unknown = -1.0;

    double base_ = unknown;
    DoubleDouble period_{}, high_{}, low_[power_period] = {};
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
    return gd_scalars<T>(hyper, step);
}

template <class T>
AdamScalars<T> scalars(const AdamHyper& hyper, int64_t step) {
    return adam_scalars<T>(hyper, hyper.bias_correction ? one_minus_power(hyper.beta1, step) : 1.0,
                           hyper.bias_correction ? one_minus_power(hyper.beta2, step) : 1.0);
}

template GdScalars<float> scalars<float>(const GdHyper&, int64_t);
template GdScalars<double> scalars<double>(const GdHyper&, int64_t);
template AdamScalars<float> scalars<float>(const AdamHyper&, int64_t);
template AdamScalars<double> scalars<double>(const AdamHyper&, int64_t);

}  // namespace fusedstep
