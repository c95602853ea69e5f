// What each thread of a step's kernel does. A thread's place in the grid is an argument, so that tests can
// run this on the host; it synchronises with no other thread.
#pragma once

#include "../core/job.hpp"
#include "step_table.hpp"
#include "vec_cuda.hpp"

#if defined(__CUDA_ARCH__)
#define FUSEDSTEP_UNROLL _Pragma("unroll")
#else
#define FUSEDSTEP_UNROLL
#endif

namespace fusedstep::cuda {

struct Place {
    uint32_t block, blocks;
    int thread, threads;
};

template <class T, int lanes>
struct alignas(sizeof(T) * lanes) Pack {
    T x[lanes];
};

// Steps the elements of the pack at element `at`.
template <class Rule, class T, int lanes, class Scalars>
FUSEDSTEP_INLINE void step_pack(void* const* streams, int64_t at, const Scalars& scalars) {
    Pack<T, lanes> packs[Rule::streams];
    FUSEDSTEP_UNROLL
    for (int k = 0; k < Rule::streams; ++k) {
        packs[k] = *reinterpret_cast<const Pack<T, lanes>*>(static_cast<const T*>(streams[k]) + at);
    }
    FUSEDSTEP_UNROLL
    for (int i = 0; i < lanes; ++i) {
        Vec<T> values[Rule::streams];
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) values[k] = Vec<T>(packs[k].x[i]);
        Rule::apply(values, scalars);
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) packs[k].x[i] = values[k].x;
    }
    FUSEDSTEP_UNROLL
    for (int k = 0; k < Rule::streams; ++k) {
        if (Rule::written >> k & 1) *reinterpret_cast<Pack<T, lanes>*>(static_cast<T*>(streams[k]) + at) = packs[k];
    }
}

// Steps one chunk of a dense tensor, which begins `lead` elements past a pack boundary. Only the first and
// the last pack of a tensor can be partial.
template <class Rule, class T, int lanes, class Scalars>
FUSEDSTEP_INLINE void step_packs(const Entry<Rule, Dense>& entry, int64_t chunk, int lead, const Scalars& scalars,
                                 const Place& place) {
    void* streams[Rule::streams];
    FUSEDSTEP_UNROLL
    for (int k = 0; k < Rule::streams; ++k) streams[k] = entry.streams[k];
    const int64_t size = entry.size;
    const int64_t begin = chunk * chunk_elements<T> - lead;
    const int64_t end = begin + chunk_elements<T> < size ? begin + chunk_elements<T> : size;
    for (int64_t at = begin + place.thread * lanes; at < end; at += place.threads * lanes) {
        if (at >= 0 && at + lanes <= size) {
            step_pack<Rule, T, lanes>(streams, at, scalars);
        } else {
            for (int i = 0; i < lanes; ++i) {
                if (at + i >= 0 && at + i < size) step_pack<Rule, T, 1>(streams, at + i, scalars);
            }
        }
    }
}

template <class Rule, class T, class Table, class Scalars>
FUSEDSTEP_INLINE void step_chunk(const Table&, const Entry<Rule, Dense>& entry, int64_t chunk, const Scalars& scalars,
                                 const Place& place) {
    if (entry.placing.lead == Dense::no_packs)
        step_packs<Rule, T, 1>(entry, chunk, 0, scalars, place);
    else
        step_packs<Rule, T, pack_lanes<T>>(entry, chunk, entry.placing.lead, scalars, place);
}

template <class Rule, class T, class Table, class Scalars>
FUSEDSTEP_INLINE void step_chunk(const Table& table, const Entry<Rule, Strided>& entry, int64_t chunk,
                                 const Scalars& scalars, const Place& place) {
    const int64_t* const layout = table.template from_end<int64_t>(entry.placing.layout);
    const int dimensions = static_cast<int>(layout[0]);
    const int64_t* const shape = layout + 1;
    const int64_t* const strides = shape + dimensions;
    const int64_t begin = chunk * chunk_elements<T>;
    const int64_t end = begin + chunk_elements<T> < entry.size ? begin + chunk_elements<T> : entry.size;
    for (int64_t at = begin + place.thread; at < end; at += place.threads) {
        char* elements[Rule::streams];
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) elements[k] = static_cast<char*>(entry.streams[k]);
        uint64_t rest = static_cast<uint64_t>(at);
        for (int d = dimensions - 1; d >= 0; --d) {
            const uint64_t length = static_cast<uint64_t>(shape[d]);
            const uint64_t next = rest / length;
            const int64_t index = static_cast<int64_t>(rest - next * length);
            rest = next;
            FUSEDSTEP_UNROLL
            for (int k = 0; k < Rule::streams; ++k) elements[k] += index * strides[k * dimensions + d];
        }
        Vec<T> values[Rule::streams];
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) values[k] = Vec<T>(*reinterpret_cast<const T*>(elements[k]));
        Rule::apply(values, scalars);
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) {
            if (Rule::written >> k & 1) *reinterpret_cast<T*>(elements[k]) = values[k].x;
        }
    }
}

// The tensor that a chunk belongs to, which is not before tensor `from`.
template <class E>
FUSEDSTEP_INLINE uint32_t tensor_of(const E* entries, uint32_t from, uint32_t count, uint32_t chunk) {
    uint32_t to = count - 1;
    while (from < to) {
        const uint32_t middle = (from + to) / 2;
        if (chunk < entries[middle].chunks_end)
            to = middle;
        else
            from = middle + 1;
    }
    return from;
}

template <class Rule, class T, class Placing, class Table>
FUSEDSTEP_INLINE void step_table(const Table& table, const Place& place) {
    using E = Entry<Rule, Placing>;
    using Scalars = typename Rule::template Scalars<T>;
    const E* const entries = table.template entries<E>();
    uint32_t i = 0;
    for (uint32_t chunk = place.block; chunk < table.chunks; chunk += place.blocks) {
        i = tensor_of(entries, i, table.count, chunk);
        const uint32_t first = i == 0 ? 0 : entries[i - 1].chunks_end;
        const Scalars scalars = *table.template from_end<Scalars>(entries[i].scalars);
        step_chunk<Rule, T>(table, entries[i], chunk - first, scalars, place);
    }
}

}  // namespace fusedstep::cuda

#undef FUSEDSTEP_UNROLL
