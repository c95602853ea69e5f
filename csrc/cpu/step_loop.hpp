// The loop over memory: load every stream, let the rule compute, store what the rule writes. It owns no
// mathematics, and each element is read once and written once, so an in-place update is safe.
#pragma once

#include <cstdint>

#include "../rules/gd.hpp"

namespace fusedstep {

struct Whole {
    template <class V>
    FUSEDSTEP_INLINE V load(const typename V::Element* from) const {
        return V::load(from);
    }
    template <class V>
    FUSEDSTEP_INLINE void store(V value, typename V::Element* to) const {
        value.store(to);
    }
};

struct First {
    int count;
    template <class V>
    FUSEDSTEP_INLINE V load(const typename V::Element* from) const {
        return V::load(from, count);
    }
    template <class V>
    FUSEDSTEP_INLINE void store(V value, typename V::Element* to) const {
        value.store(to, count);
    }
};

template <class Rule, class V, class Access, class Scalars>
FUSEDSTEP_INLINE void step_vector(typename V::Element* const* data, int64_t at, const Scalars& scalars, Access access) {
    V values[Rule::streams];
#pragma GCC unroll 8
    for (int k = 0; k < Rule::streams; ++k) values[k] = access.template load<V>(data[k] + at);
    apply<Rule>(values, scalars);
#pragma GCC unroll 8
    for (int k = 0; k < Rule::streams; ++k) {
        if (Rule::written >> k & 1) access.store(values[k], data[k] + at);
    }
}

// Updates elements [begin, begin + count) of the arrays that `streams` points to.
template <class Rule, class V>
void step_loop(void* const* streams, int64_t begin, int64_t count, const void* scalars) {
    using T = typename V::Element;
    // A copy that no store can alias, so that its broadcasts leave the loop.
    const auto s = *static_cast<const typename Rule::template Scalars<T>*>(scalars);
    T* data[Rule::streams];
    for (int k = 0; k < Rule::streams; ++k) data[k] = static_cast<T*>(streams[k]) + begin;

    int64_t at = 0;
    for (; at + V::lanes <= count; at += V::lanes) step_vector<Rule, V>(data, at, s, Whole{});
    if (at < count) step_vector<Rule, V>(data, at, s, First{static_cast<int>(count - at)});
}

}  // namespace fusedstep
