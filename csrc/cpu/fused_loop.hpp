// The step loop for streams that are not all native: decode, compute and encode in one pass. It exists for
// the combinations of formats that are worth the code; tile.cpp serves all the others, with the same bits.
//
// A step is taken in two stages: the state of a block, and then, a block later, its parameter and all that is
// encoded. By then the scales of 8-bit blocks are known, and instructions of both stages, which do not depend on
// each other, fill the time that divisions and roots take.
#pragma once

#include <tuple>
#include <utility>

#include "codec_loop.hpp"

namespace fusedstep {

template <class Rule, class V, class... Accesses>
class FusedLoop {
public:
    // Whole blocks: elements [begin, begin + count), both multiples of 64.
    static void run(const Stream* streams, int64_t begin, int64_t count, const void* scalars, uint64_t random) {
        if (count == 0) return;
        const auto loop = [&](const auto& s) __attribute__((always_inline)) {
            run_blocks(streams, begin, count, s, random, std::make_index_sequence<sizeof...(Accesses)>());
        };
        with_constants(*static_cast<const typename Rule::template Scalars<float>*>(scalars), loop);
    }

private:
    static_assert(sizeof...(Accesses) == Rule::streams);
    using Block = std::tuple<Accesses...>;
    using Scales = std::tuple<typename Accesses::Scale...>;
    using State = float[Rule::streams][block_elements];

    static constexpr bool is_state(size_t k) { return k > 0 && (Rule::written >> k & 1) != 0; }
    // Between the stages, state that is encoded.
    static constexpr bool is_kept(size_t k) { return is_state(k) && !written_at_once[k]; }
    static constexpr bool written_at_once[Rule::streams] = {Accesses::native...};
    // Every other root beside the divider, which both stages wait for; where blocks are encoded, they wait for others.
    static constexpr bool has_blocks = (Accesses::blockwise || ...);
    static constexpr bool is_blockwise[Rule::streams] = {Accesses::blockwise...};
    // Rounding a NaN needs care, except where none can come up that is not a bfloat16.
    static constexpr bool may_be_nan = !(Accesses::nan_is_bfloat16 && ...);

    template <class Scalars, size_t... k>
    FUSEDSTEP_INLINE static void run_blocks(const Stream* streams, int64_t at, int64_t count, const Scalars& scalars,
                                            uint64_t random, std::index_sequence<k...> all) {
        alignas(64) State states[2];
        Block block(Accesses(streams[k], at)...);
        stages<true, false>(block, states[0], block, Scales(), states[1], scalars, all);
        uint64_t number = static_cast<uint64_t>(at) / block_elements;
        for (int parity = 0;; parity ^= 1) {
            const uint64_t bits = (Accesses::random || ...) ? random_block(random, number++) : 0;
            const Scales scales = scales_of(block, bits, all);
            if ((count -= block_elements) == 0) {
                stages<false, true>(block, states[parity ^ 1], block, scales, states[parity], scalars, all);
                return;
            }
            (std::get<k>(block).advance(), ...);
            const Block before(std::get<k>(block).before()...);
            stages<true, true>(block, states[parity ^ 1], before, scales, states[parity], scalars, all);
        }
    }

    template <size_t... k>
    FUSEDSTEP_INLINE static Scales scales_of(const Block& block, uint64_t random, std::index_sequence<k...>) {
        constexpr size_t last = sizeof...(k) - 1;
        if constexpr (V::lanes > 1 && is_blockwise[last] && is_blockwise[last - 1]) {
            const auto& m = std::get<last - 1>(block);
            const auto& v = std::get<last>(block);
            const auto both = m.scales_of_both(v);
            const auto scale = [&](auto index) __attribute__((always_inline)) {
                if constexpr (index == last)
                    return v.scale(random, both.second);
                else if constexpr (index == last - 1)
                    return m.scale(random, both.first);
                else
                    return std::get<index>(block).scale(random);
            };
            return Scales(scale(std::integral_constant<size_t, k>())...);
        } else {
            return Scales(std::get<k>(block).scale(random)...);
        }
    }

    // The first stage of `block`, and the second of the block before it.
    template <bool first, bool second, class Scalars, size_t... k>
    FUSEDSTEP_INLINE static void stages(Block& block, State& state, const Block& before, const Scales& scales,
                                        const State& state_before, const Scalars& scalars, std::index_sequence<k...>) {
#pragma GCC unroll 2
        for (int vector = 0; vector < block_elements / V::lanes; vector += 4) {
            V done[4];
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) {
                V values[Rule::streams];
                if constexpr (first) {
                    ((values[k] = std::get<k>(block).decode(vector + u)), ...);
                    Rule::update_state(values, scalars);
                    (keep<k>(block, state, vector + u, values[k]), ...);
                }
                if constexpr (second) {
                    ((values[k] = is_kept(k) ? V::load(state_before[k] + (vector + u) * V::lanes)
                                             : std::get<k>(before).decode(vector + u)),
                     ...);
                    done[u] = u % 2 == 0 || has_blocks ? updated_parameter<V>(values, scalars)
                                                       : updated_parameter<typename V::OwnRoot>(values, scalars);
                }
            }
            if constexpr (second) {
                std::get<0>(before).template encode<may_be_nan>(vector, done, std::get<0>(scales));
                (encode_kept<k>(before, std::get<k>(scales), state_before, vector), ...);
            }
        }
        if constexpr (second) (std::get<k>(before).finish(std::get<k>(scales)), ...);
    }

    template <class W, class Scalars>
    FUSEDSTEP_INLINE static V updated_parameter(const V (&from)[Rule::streams], const Scalars& scalars) {
        W values[Rule::streams];
        for (int k = 0; k < Rule::streams; ++k) values[k] = W(from[k]);
        Rule::update_parameter(values, scalars);
        return V(values[0]);
    }

    template <size_t k>
    FUSEDSTEP_INLINE static void keep(Block& block, State& state, int vector, V value) {
        if constexpr (is_kept(k)) {
            std::get<k>(block).observe(value);
            value.store(state[k] + vector * V::lanes);
        } else if constexpr (is_state(k)) {
            std::get<k>(block).write(vector, value);
        }
    }

    template <size_t k, class Scale>
    FUSEDSTEP_INLINE static void encode_kept(const Block& block, const Scale& scale, const State& state, int vector) {
        if constexpr (is_kept(k)) {
            V values[4];
            for (int u = 0; u < 4; ++u) values[u] = V::load(state[k] + (vector + u) * V::lanes);
            std::get<k>(block).template encode<may_be_nan>(vector, values, scale);
        }
    }
};

}  // namespace fusedstep
