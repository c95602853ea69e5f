// 1 - base^exponent in double-double arithmetic, the same on every processor and on GPUs: it needs add and
// multiply alone. libm's pow differs between libraries, and even between processors under one library.
#pragma once

#include <cstdint>

#include "inline.hpp"

namespace fusedstep {

// A number as an unevaluated sum of two doubles, about 106 bits (Dekker 1971).
struct DoubleDouble {
    double high, low;
};

// Veltkamp's splitting rather than fma: the baseline build has no fma instruction.
FUSEDSTEP_INLINE void split(double a, double& high, double& low) {
    const double scaled = 134217729.0 * a;  // 2^27 + 1
    high = scaled - (scaled - a);
    low = a - high;
}

FUSEDSTEP_INLINE DoubleDouble multiply(DoubleDouble a, DoubleDouble b) {
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
FUSEDSTEP_INLINE DoubleDouble power_of(DoubleDouble base, int64_t exponent) {
    DoubleDouble power{1.0, 0.0};
    for (DoubleDouble square = base; exponent != 0; exponent >>= 1) {
        // Below 1e-40 a power no longer changes 1 - power; stopping also keeps clear of denormals.
        if (square.high < 1e-40) return {0.0, 0.0};
        if (exponent & 1) power = multiply(power, square);
        square = multiply(square, square);
    }
    return power;
}

// base^t is put together of two powers, (base^64)^(t / 64) and base^(t % 64), so that whoever takes one step
// after the other can keep both and need only multiply. Nothing else makes a difference to the bits.
constexpr int64_t power_period = 64;

FUSEDSTEP_INLINE double one_minus_product(DoubleDouble high, DoubleDouble low) {
    if (high.high < 1e-40) return 1.0;
    const DoubleDouble power = multiply(high, low);
    return (1.0 - power.high) - power.low;
}

FUSEDSTEP_INLINE double compute_one_minus_power(double base, int64_t exponent) {
    const DoubleDouble period = power_of({base, 0.0}, power_period);
    return one_minus_product(power_of(period, exponent / power_period), power_of({base, 0.0}, exponent % power_period));
}

}  // namespace fusedstep
