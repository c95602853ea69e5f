// Gradient descent, plain and with momentum.
//
// A rule is mathematics: it is given values and gives values back, and never sees memory. It is written
// over a type V (a number or a vector of numbers) with + - * /, fma, sqrt and max, and is instantiated
// by every backend. `streams` counts the arrays a step touches, in the order of `values`; bit k of
// `written` is set when stream k is written back. The state is updated first, from the gradient and the old
// parameter, and then the parameter.
#pragma once

#include "inline.hpp"

namespace fusedstep {

template <class Rule, class V, class Scalars>
FUSEDSTEP_INLINE void apply(V (&values)[Rule::streams], const Scalars& scalars) {
    Rule::update_state(values, scalars);
    Rule::update_parameter(values, scalars);
}

template <class T>
struct GdScalars {
    T grad_scale;    // negative when maximising
    T weight_decay;  // L2, added to the gradient; 0 is off
    T momentum;
    T one_minus_dampening;
    T neg_lr;
    bool nesterov;
    bool first;  // the first step starts the momentum buffer from the gradient
};

// Calls `loop` with the scalars. A rule whose usual scalars are worth a loop of their own calls it with those as
// constants of the compiler.
template <class T, class Loop>
FUSEDSTEP_INLINE void with_constants(const GdScalars<T>& s, Loop loop) {
    loop(s);
}

// grad_scale * g is exact for a scale of 1 or -1, so it needs no branch. Decay does: a parameter that is
// infinite must not turn into NaN where there is no decay.
template <class V, class Scalars>
FUSEDSTEP_INLINE V scaled_gradient(const V& p, const V& g, const Scalars& s) {
    V scaled = V(s.grad_scale) * g;
    if (s.weight_decay != 0) scaled = fma(V(s.weight_decay), p, scaled);
    return scaled;
}

struct Gd {
    template <class T>
    using Scalars = GdScalars<T>;
    static constexpr int streams = 2;
    static constexpr unsigned written = 0b01;

    template <class V>
    FUSEDSTEP_INLINE static void update_state(V (&)[streams], const Scalars<typename V::Element>&) {}

    template <class V>
    FUSEDSTEP_INLINE static void update_parameter(V (&values)[streams], const Scalars<typename V::Element>& s) {
        auto& [p, g] = values;
        p = fma(V(s.neg_lr), scaled_gradient(p, g, s), p);
    }
};

struct GdMomentum {
    template <class T>
    using Scalars = GdScalars<T>;
    static constexpr int streams = 3;
    static constexpr unsigned written = 0b101;

    template <class V>
    FUSEDSTEP_INLINE static void update_state(V (&values)[streams], const Scalars<typename V::Element>& s) {
        auto& [p, g, b] = values;
        const V scaled = scaled_gradient(p, g, s);
        b = s.first ? scaled : fma(V(s.momentum), b, V(s.one_minus_dampening) * scaled);
    }

    template <class V>
    FUSEDSTEP_INLINE static void update_parameter(V (&values)[streams], const Scalars<typename V::Element>& s) {
        auto& [p, g, b] = values;
        const V update = s.nesterov ? fma(V(s.momentum), b, scaled_gradient(p, g, s)) : b;
        p = fma(V(s.neg_lr), update, p);
    }
};

}  // namespace fusedstep
