// Steps over memory that holds denormals, on processors that take about 130 cycles for each instruction that meets one
// (in a multiplication, division or root: Intel's; adding and converting cost nothing more). Moments decay into them,
// and stay: 0.9 times the smallest few denormals is rounded to what it was.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../rules/adam.hpp"
#include "float_flags.hpp"
#include "step_loop.hpp"

namespace fusedstep {

// A float32 vector with V's results, which come by way of float64 where an operand is denormal. There a product is
// exact; quotients and roots, rounded twice, are what they are rounded once, for 53 >= 2 * 24 + 2 (Figueroa, "When is
// double rounding innocuous?", 1995); and so is a sum whose first rounding is to odd (Boldo & Melquiond, 2008).
template <class V>
struct Careful {
    using Element = float;
    static constexpr int lanes = V::lanes;

    V x;

    FUSEDSTEP_INLINE Careful() = default;
    FUSEDSTEP_INLINE explicit Careful(float value) : x(value) {}
    FUSEDSTEP_INLINE Careful(V value) : x(value) {}

    FUSEDSTEP_INLINE static Careful load(const float* from, int n) { return V::load(from, n); }
    FUSEDSTEP_INLINE void store(float* to, int n) const { x.store(to, n); }

    FUSEDSTEP_INLINE friend Careful operator+(Careful a, Careful b) { return a.x + b.x; }
    FUSEDSTEP_INLINE friend Careful operator-(Careful a, Careful b) { return a.x - b.x; }
    FUSEDSTEP_INLINE friend Careful max(Careful a, Careful b) { return max(a.x, b.x); }
    FUSEDSTEP_INLINE friend Careful operator*(Careful a, Careful b) {
        if (!any_denormal(a.x, b.x)) return a.x * b.x;
        return narrowed(lower_half(a.x) * lower_half(b.x), upper_half(a.x) * upper_half(b.x));
    }
    FUSEDSTEP_INLINE friend Careful operator/(Careful a, Careful b) {
        if (!any_denormal(a.x, b.x)) return a.x / b.x;
        return narrowed(lower_half(a.x) / lower_half(b.x), upper_half(a.x) / upper_half(b.x));
    }
    FUSEDSTEP_INLINE friend Careful sqrt(Careful a) {
        return any_denormal(a.x, a.x) ? sqrt_with_denormals(a.x) : sqrt(a.x);
    }
    FUSEDSTEP_INLINE friend Careful fma(Careful a, Careful b, Careful c) {
        if (!any_denormal(a.x, b.x)) {
            if (!any_denormal(c.x, c.x)) return fma(a.x, b.x, c.x);
            if (all_zero(a.x)) return a.x * b.x + c.x;
        }
        return narrowed(sum_to_odd(lower_half(a.x) * lower_half(b.x), lower_half(c.x)),
                        sum_to_odd(upper_half(a.x) * upper_half(b.x), upper_half(c.x)));
    }
};

// Beside an addend of some size, a denormal dividend is as good as zero: the quotient is at most 2^-86, its product
// 2^-76, and half a unit in the addend's last place at least 2^-74.
template <class V>
FUSEDSTEP_INLINE Careful<V> fma_of_quotient(const Careful<V>& scale, const Careful<V>& dividend,
                                            const Careful<V>& divisor, const Careful<V>& addend) {
    const bool vanishes = all_at_least(V(0x1p10f), scale.x) && all_at_least(divisor.x, V(0x1p-40f)) &&
                          all_at_least(addend.x, V(0x1p-50f));
    return fma(scale, (vanishes ? Careful<V>(without_denormals(dividend.x)) : dividend) / divisor, addend);
}

// Whether elements [begin, begin + count) held denormals, which they are updated around.
template <class Rule, class V>
bool careful_step_loop(void* const* streams, int64_t begin, int64_t count, const void* scalars) {
    const auto s = *static_cast<const typename Rule::template Scalars<float>*>(scalars);
    float* data[Rule::streams];
    for (int k = 0; k < Rule::streams; ++k) data[k] = static_cast<float*>(streams[k]) + begin;

    bool met = false;
    for (int64_t at = 0; at < count; at += V::lanes) {
        const First part{static_cast<int>(std::min<int64_t>(V::lanes, count - at))};
        bool here = false;
        for (int k = 0; k < Rule::streams; ++k) {
            const V value = part.template load<V>(data[k] + at);
            here = here || any_denormal(value, value);
        }
        met = met || here;
        if (here)
            step_vector<Rule, Careful<V>>(data, at, s, part);
        else
            step_vector<Rule, V>(data, at, s, part);
    }
    return met;
}

// step_loop, which goes carefully for as long as the processor says that it meets denormals.
template <class Rule, class V>
void step_loop_around_denormals(void* const* streams, int64_t begin, int64_t count, const void* scalars) {
    constexpr int64_t stretch = 4096;
    if (count < stretch / 4) return step_loop<Rule, V, true>(streams, begin, count, scalars);
    // What this thread met last, which it will meet again where it goes on.
    static thread_local bool careful = false;
    for (const int64_t end = begin + count; begin < end; begin += stretch) {
        const int64_t n = std::min(stretch, end - begin);
        if (careful) {
            careful = careful_step_loop<Rule, V>(streams, begin, n, scalars);
        } else {
            clear_float_flags();
            step_loop<Rule, V, true>(streams, begin, n, scalars);
            careful = denormals_were_met();
        }
    }
}

}  // namespace fusedstep
