// The loop over memory: load every stream, let the rule compute, store what the rule writes. It owns no
// mathematics, and each element is read once and written once, so an in-place update is safe.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../rules/gd.hpp"
#include "fetch_ahead.hpp"

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

// How many elements come before the first whole vector of memory.
template <class V>
FUSEDSTEP_INLINE int elements_before_vector(const typename V::Element* from) {
    return static_cast<int>(-(reinterpret_cast<uintptr_t>(from) / sizeof(*from)) % V::lanes);
}

// Updates elements [begin, begin + count) of the arrays that `streams` points to.
template <class Rule, class V, bool fetch>
[[gnu::noinline]] void step_loop(void* const* streams, int64_t begin, int64_t count, const void* scalars) {
    using T = typename V::Element;
    T* data[Rule::streams];
    for (int k = 0; k < Rule::streams; ++k) data[k] = static_cast<T*>(streams[k]) + begin;

    // The scalars are a copy that no store can alias, so that their broadcasts leave the loop.
    const auto loop = [&](const auto s) __attribute__((always_inline)) {
        int64_t at = 0;
        // NumPy's large arrays begin 16 bytes past a cache line, and an access to two lines takes as long as two.
        if (const int head = elements_before_vector<V>(data[0]); head != 0 && count >= 16 * V::lanes) {
            step_vector<Rule, V>(data, 0, s, First{head});
            at = head;
        }
        // Three roots beside the divider, which finds the fourth meanwhile.
        using OwnRoot = typename V::OwnRoot;
        constexpr int line = cache_line / sizeof(T), lines = std::is_same_v<V, OwnRoot> ? 1 : 4;
        for (; at + lines * line <= count; at += lines * line) {
#pragma GCC unroll 4
            for (int u = 0; u < lines; ++u) {
                const int64_t here = at + u * line;
                if constexpr (fetch) {
#pragma GCC unroll 8
                    for (int k = 0; k < Rule::streams; ++k) fetch_ahead<line>(data[k] + here);
                }
#pragma GCC unroll 2
                for (int i = 0; i < line; i += V::lanes) {
                    if (u == 3)
                        step_vector<Rule, V>(data, here + i, s, Whole{});
                    else
                        step_vector<Rule, OwnRoot>(data, here + i, s, Whole{});
                }
            }
        }
        for (; at + V::lanes <= count; at += V::lanes) step_vector<Rule, OwnRoot>(data, at, s, Whole{});
        if (at < count) step_vector<Rule, V>(data, at, s, First{static_cast<int>(count - at)});
    };
    with_constants(*static_cast<const typename Rule::template Scalars<T>*>(scalars), loop);
}

}  // namespace fusedstep
