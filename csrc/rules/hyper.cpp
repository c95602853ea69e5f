#include "hyper.hpp"

#include "power.hpp"

namespace fusedstep {
namespace {

// base, base^2, base^4, ... as far as they have been asked for. They are kept from step to step because they
// do not depend on the step, and squaring is most of the work of a power.
class Squares {
public:
    double base() const { return squares_[0].high; }
    void start(double base) {
        squares_[0] = {base, 0.0};
        known_ = 1;
    }
    const DoubleDouble& operator[](int i) {
        for (; known_ <= i; ++known_) squares_[known_] = multiply(squares_[known_ - 1], squares_[known_ - 1]);
        return squares_[i];
    }

private:
    DoubleDouble squares_[64] = {};
    int known_ = 1;
};

// The squares of the two bases that this thread used last.
Squares& squares_of(double base) {
    static thread_local Squares recent[2];
    static thread_local int oldest = 0;
    for (Squares& squares : recent) {
        if (squares.base() == base) return squares;
    }
    Squares& squares = recent[oldest];
    oldest = 1 - oldest;
    squares.start(base);
    return squares;
}

}  // namespace

double one_minus_power(double base, int64_t exponent) { return one_minus_power_from(squares_of(base), exponent); }

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
