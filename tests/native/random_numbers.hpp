// Random numbers of all kinds, for the programs that compare kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "../../csrc/rules/adam.hpp"
#include "../../csrc/rules/gd.hpp"

namespace fusedstep {

using Random = std::mt19937_64;

inline int64_t below(Random& random, int64_t end) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(end));
}

inline double between(Random& random, double low, double high) {
    return low + (high - low) * static_cast<double>(random() >> 11) * 0x1p-53;
}

// Half of them ordinary, half of any magnitude down to the denormals.
template <class T>
T number(Random& random) {
    using Limits = std::numeric_limits<T>;
    const int least = below(random, 2) ? -8 : Limits::min_exponent - Limits::digits;
    return static_cast<T>(std::ldexp(between(random, -1, 1), least + static_cast<int>(below(random, 32 - least))));
}

template <class T>
T special(Random& random) {
    constexpr T specials[] = {T(0), -T(0), std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN()};
    return specials[below(random, 4)];
}

template <class T>
void randomise(GdScalars<T>& s, Random& random) {
    s.grad_scale = static_cast<T>(below(random, 2) ? -1 : between(random, 0, 2));
    s.weight_decay = static_cast<T>(below(random, 2) ? 0 : between(random, 0, 0.1));
    s.momentum = static_cast<T>(between(random, 0, 1));
    s.one_minus_dampening = static_cast<T>(between(random, 0, 1));
    s.neg_lr = static_cast<T>(between(random, -1, 0));
    s.nesterov = below(random, 2);
    s.first = below(random, 2);
}

template <class T>
void randomise(AdamScalars<T>& s, Random& random) {
    s.grad_scale = static_cast<T>(below(random, 2) ? -1 : between(random, 0, 2));
    s.weight_decay = static_cast<T>(below(random, 2) ? 0 : between(random, 0, 0.1));
    s.param_decay = static_cast<T>(below(random, 2) ? 1 : between(random, 0.9, 1));
    s.moment_from_gradient = below(random, 2);
    s.moment_weight = static_cast<T>(s.moment_from_gradient ? between(random, -0.5, 0) : between(random, 0, 0.5));
    s.beta2 = static_cast<T>(between(random, 0, 1));
    s.one_minus_beta2 = static_cast<T>(between(random, 0, 1));
    s.inv_sqrt_correction = static_cast<T>(between(random, 1, 40));
    s.eps = static_cast<T>(below(random, 2) ? 0 : between(random, 0, 1e-6));
    s.neg_step_size = static_cast<T>(between(random, -1, 0));
}

}  // namespace fusedstep
