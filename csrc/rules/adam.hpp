// Adam (Kingma & Ba 2015, algorithm 1), AdamW (Loshchilov & Hutter 2019, algorithm 2) and AMSGrad (Reddi
// et al. 2018; as PyTorch has it, the maximum is taken of the uncorrected second moment).
// gd.hpp says what a rule is.
#pragma once

#include "gd.hpp"

namespace fusedstep {

template <class T>
struct AdamScalars {
    T grad_scale;    // negative when maximising
    T weight_decay;  // L2, added to the gradient; 0 is off
    T param_decay;   // decoupled: 1 - lr * weight_decay; 1 is off
    // m moves by (1 - beta1) of its way to the gradient. For a small beta1 that is counted from the gradient's
    // end, as torch.lerp does: the gradient has lost less to cancellation there (and nothing when beta1 is 0).
    T moment_weight;  // 1 - beta1, or -beta1
    bool moment_from_gradient;
    T beta2;
    T one_minus_beta2;
    T inv_sqrt_correction;  // 1 / sqrt(1 - beta2^t)
    T eps;
    T neg_step_size;  // -lr / (1 - beta1^t)
};

template <class V, class Scalars>
FUSEDSTEP_INLINE void update_moments(const V& p, const V& g, V& m, V& v, const Scalars& s) {
    const V scaled = scaled_gradient(p, g, s);
    const V difference = scaled - m;
    if (s.moment_from_gradient) m = scaled;
    m = fma(V(s.moment_weight), difference, m);
    v = fma(V(s.one_minus_beta2) * scaled, scaled, V(s.beta2) * v);
}

// scale * (dividend / divisor) + addend. A vector type may know a shorter way where that is the addend.
template <class V>
FUSEDSTEP_INLINE V fma_of_quotient(const V& scale, const V& dividend, const V& divisor, const V& addend) {
    return fma(scale, dividend / divisor, addend);
}

template <class V, class Scalars>
FUSEDSTEP_INLINE V descend(const V& p, const V& m, const V& v, const Scalars& s) {
    const V denominator = fma(sqrt(v), V(s.inv_sqrt_correction), V(s.eps));
    return fma_of_quotient(V(s.neg_step_size), m, denominator, V(s.param_decay) * p);
}

template <class T, class Loop>
FUSEDSTEP_INLINE void with_constants(AdamScalars<T> s, Loop loop) {
    if (s.weight_decay != 0 || s.moment_from_gradient || s.grad_scale != 1) return loop(s);
    s.grad_scale = 1;
    s.weight_decay = 0;
    s.moment_from_gradient = false;
    if (s.param_decay != 1) return loop(s);
    s.param_decay = 1;
    loop(s);
}

struct Adam {
    template <class T>
    using Scalars = AdamScalars<T>;
    static constexpr int streams = 4;
    static constexpr unsigned written = 0b1101;

    template <class V>
    FUSEDSTEP_INLINE static void update_state(V (&values)[streams], const Scalars<typename V::Element>& s) {
        auto& [p, g, m, v] = values;
        update_moments(p, g, m, v, s);
    }

    template <class V>
    FUSEDSTEP_INLINE static void update_parameter(V (&values)[streams], const Scalars<typename V::Element>& s) {
        auto& [p, g, m, v] = values;
        p = descend(p, m, v, s);
    }
};

struct AmsGrad {
    template <class T>
    using Scalars = AdamScalars<T>;
    static constexpr int streams = 5;
    static constexpr unsigned written = 0b11101;

    template <class V>
    FUSEDSTEP_INLINE static void update_state(V (&values)[streams], const Scalars<typename V::Element>& s) {
        auto& [p, g, m, v, v_max] = values;
        update_moments(p, g, m, v, s);
        v_max = max(v_max, v);
    }

    template <class V>
    FUSEDSTEP_INLINE static void update_parameter(V (&values)[streams], const Scalars<typename V::Element>& s) {
        auto& [p, g, m, v, v_max] = values;
        p = descend(p, m, v_max, s);
    }
};

}  // namespace fusedstep
