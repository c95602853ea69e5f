// The step loop for streams that are not all native: decode, compute and encode in one pass, a block at a
// time. It exists for the combinations of formats that are worth the code; tile.cpp serves all the others,
// with the same bits.
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
        const auto s = *static_cast<const typename Rule::template Scalars<float>*>(scalars);
        for (const int64_t end = begin + count; begin < end; begin += block_elements) {
            run_block(streams, begin, s, random, std::make_index_sequence<sizeof...(Accesses)>());
        }
    }

private:
    static_assert(sizeof...(Accesses) == Rule::streams);

    static constexpr bool is_written(size_t k) { return (Rule::written >> k & 1) != 0; }

    template <size_t k, class Access>
    FUSEDSTEP_INLINE static void encode_four(const Access& access, int i, const V (&values)[4][Rule::streams]) {
        access.encode(i, {values[0][k], values[1][k], values[2][k], values[3][k]});
    }

    template <class Scalars, size_t... k>
    FUSEDSTEP_INLINE static void run_block(const Stream* streams, int64_t at, const Scalars& scalars, uint64_t random,
                                           std::index_sequence<k...>) {
        run_accesses(scalars, (Accesses::random || ...) ? random_block(random, at / block_elements) : 0,
                     std::index_sequence<k...>(), Accesses(streams[k], at)...);
    }

    // The state first, which is quickly computed: its scales are ready when the parameter, with its divisions
    // and roots, is done.
    template <class Scalars, size_t... k>
    FUSEDSTEP_INLINE static void run_accesses(const Scalars& scalars, uint64_t random, std::index_sequence<k...>,
                                              Accesses... accesses) {
        alignas(64) float state[Rule::streams][block_elements];
        ((Accesses::blockwise ? void() : accesses.set_scale(random)), ...);
        for (int i = 0; i < block_elements; i += 4 * V::lanes) {
            V values[4][Rule::streams];
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) {
                const int j = i + u * V::lanes;
                ((values[u][k] = accesses.decode(j)), ...);
                Rule::update_state(values[u], scalars);
                ((k > 0 && is_written(k) ? (accesses.observe(values[u][k]), values[u][k].store(state[k] + j)) : void()),
                 ...);
            }
            ((k > 0 && is_written(k) && !Accesses::blockwise ? encode_four<k>(accesses, i, values) : void()), ...);
        }
        ((Accesses::blockwise ? accesses.set_scale(random) : void()), ...);
        for (int i = 0; i < block_elements; i += 4 * V::lanes) {
            V values[4][Rule::streams];
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) {
                const int j = i + u * V::lanes;
                ((values[u][k] = k > 0 && is_written(k) ? V::load(state[k] + j) : accesses.decode(j)), ...);
                Rule::update_parameter(values[u], scalars);
            }
            encode_four<0>(std::get<0>(std::tie(accesses...)), i, values);
        }
        for (int i = 0; i < block_elements; i += 4 * V::lanes) {
            ((Accesses::blockwise
                  ? accesses.encode(i, {V::load(state[k] + i), V::load(state[k] + i + V::lanes),
                                        V::load(state[k] + i + 2 * V::lanes), V::load(state[k] + i + 3 * V::lanes)})
                  : void()),
             ...);
        }
    }
};

}  // namespace fusedstep
