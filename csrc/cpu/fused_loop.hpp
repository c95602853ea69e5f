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
            run_blocks(streams, begin, begin + count, s, random, std::make_index_sequence<sizeof...(Accesses)>());
        };
        with_constants(*static_cast<const typename Rule::template Scalars<float>*>(scalars), loop);
    }

private:
    static_assert(sizeof...(Accesses) == Rule::streams);
    using Block = std::tuple<Accesses...>;
    using State = float[Rule::streams][block_elements];

    static constexpr bool is_written(size_t k) { return (Rule::written >> k & 1) != 0; }
    static constexpr bool is_state(size_t k) { return k > 0 && is_written(k); }

    template <class Scalars, size_t... k>
    FUSEDSTEP_INLINE static void run_blocks(const Stream* streams, int64_t at, int64_t end, const Scalars& scalars,
                                            uint64_t random, std::index_sequence<k...> all) {
        alignas(64) State states[2];
        Block block(Accesses(streams[k], at)...);
        stages<true, false>(block, states[0], block, states[1], scalars, all);
        for (int parity = 0;; parity ^= 1) {
            const uint64_t bits = (Accesses::random || ...) ? random_block(random, at / block_elements) : 0;
            (std::get<k>(block).set_scale(bits), ...);
            at += block_elements;
            if (at == end) {
                stages<false, true>(block, states[parity ^ 1], block, states[parity], scalars, all);
                return;
            }
            Block next(Accesses(streams[k], at)...);
            stages<true, true>(next, states[parity ^ 1], block, states[parity], scalars, all);
            block = next;
        }
    }

    // The first stage of `block`, and the second of the block before it.
    template <bool first, bool second, class Scalars, size_t... k>
    FUSEDSTEP_INLINE static void stages(Block& block, State& state, const Block& before, const State& state_before,
                                        const Scalars& scalars, std::index_sequence<k...>) {
#pragma GCC unroll 2
        for (int i = 0; i < block_elements; i += 4 * V::lanes) {
            V done[4][Rule::streams];
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) {
                const int j = i + u * V::lanes;
                if constexpr (first) {
                    V values[Rule::streams];
                    ((values[k] = std::get<k>(block).decode(j)), ...);
                    Rule::update_state(values, scalars);
                    ((is_state(k) ? (std::get<k>(block).observe(values[k]), values[k].store(state[k] + j)) : void()),
                     ...);
                }
                if constexpr (second) {
                    ((done[u][k] = is_state(k) ? V::load(state_before[k] + j) : std::get<k>(before).decode(j)), ...);
                    Rule::update_parameter(done[u], scalars);
                }
            }
            if constexpr (second) (encode<k>(before, i, done), ...);
        }
    }

    template <size_t k>
    FUSEDSTEP_INLINE static void encode(const Block& block, int i, const V (&values)[4][Rule::streams]) {
        if constexpr (is_written(k)) {
            std::get<k>(block).encode(i, {values[0][k], values[1][k], values[2][k], values[3][k]});
        }
    }
};

}  // namespace fusedstep
