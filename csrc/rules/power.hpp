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

// squares[i] is base^(2^i); they are asked for in order.
template <class Squares>
FUSEDSTEP_INLINE double one_minus_power_from(Squares& squares, int64_t exponent) {
    DoubleDouble power{1.0, 0.0};
    for (int i = 0; exponent != 0; ++i, exponent >>= 1) {
        const DoubleDouble square = squares[i];
        // Below 1e-40 a power no longer changes 1 - power; stopping also keeps clear of denormals.
        if (square.high < 1e-40) return 1.0;
        if (exponent & 1) power = multiply(power, square);
    }
    return (1.0 - power.high) - power.low;
}

}  // namespace fusedstep
