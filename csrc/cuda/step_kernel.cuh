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
        apply<Rule>(values, scalars);
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) packs[k].x[i] = values[k].x;
    }
    FUSEDSTEP_UNROLL
    for (int k = 0; k < Rule::streams; ++k) {
        if (Rule::written >> k & 1) *reinterpret_cast<Pack<T, lanes>*>(static_cast<T*>(streams[k]) + at) = packs[k];
    }
}

// Steps one chunk of a dense tensor: elements from `begin`, which is before the first where that lies past a
// pack boundary, to `end`. Only the first and the last pack of a tensor can be partial.
template <class Rule, class T, int lanes, class Scalars>
FUSEDSTEP_INLINE void step_packs(void* const* streams, int64_t begin, int64_t end, const Scalars& scalars,
                                 const Place& place) {
    for (int64_t at = begin + place.thread * lanes; at < end; at += place.threads * lanes) {
        if (at >= 0 && at + lanes <= end) {
            step_pack<Rule, T, lanes>(streams, at, scalars);
        } else {
            for (int i = 0; i < lanes; ++i) {
                if (at + i >= 0 && at + i < end) step_pack<Rule, T, 1>(streams, at + i, scalars);
            }
        }
    }
}

// Steps `count` elements of a chunk. A count that is less than a whole chunk's is the last one's.
template <class Rule, class T, class Table, class Scalars>
FUSEDSTEP_INLINE void step_chunk(const Table&, const Entry<Rule, Dense>&, void* const* streams, int64_t chunk,
                                 int64_t count, const Scalars& scalars, const Place& place) {
    const int lead = common_lead<T>(streams, Rule::streams);
    const int64_t begin = chunk * chunk_elements<T> - (lead < 0 ? 0 : lead);
    if (lead < 0)
        step_packs<Rule, T, 1>(streams, begin, begin + count, scalars, place);
    else
        step_packs<Rule, T, pack_lanes<T>>(streams, begin, begin + count, scalars, place);
}

template <class Rule, class T, class Table, class Scalars>
FUSEDSTEP_INLINE void step_chunk(const Table& table, const Entry<Rule, Strided>& entry, void* const* streams,
                                 int64_t chunk, int64_t count, const Scalars& scalars, const Place& place) {
    const int64_t* const layout = table.template from_end<int64_t>(entry.layout);
    const int dimensions = static_cast<int>(layout[0]);
    const int64_t* const shape = layout + 1;
    const int64_t* const strides = shape + dimensions;
    const int64_t begin = chunk * chunk_elements<T>;
    for (int64_t at = begin + place.thread; at < begin + count; at += place.threads) {
        char* elements[Rule::streams];
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) elements[k] = static_cast<char*>(streams[k]);
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
        apply<Rule>(values, scalars);
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
    using S = Shared<Rule, T>;
    const E* const entries = table.template entries<E>();
    uint32_t i = 0;
    for (uint32_t chunk = place.block; chunk < table.chunks; chunk += place.blocks) {
        i = tensor_of(entries, i, table.count, chunk);
        const E& entry = entries[i];
        const S& shared = *table.template from_end<S>(entry.shared);
        void* streams[Rule::streams];
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) {
            streams[k] = shared.bases[k] + uint64_t{entry.streams[k]} * sizeof(T);
        }
        const typename S::Scalars scalars = shared.on_gpu != nullptr ? *shared.on_gpu : shared.scalars;
        const uint32_t first = i == 0 ? 0 : entries[i - 1].chunks_end;
        const int64_t count = chunk + 1 == entry.chunks_end ? entry.last : chunk_elements<T>;
        step_chunk<Rule, T>(table, entry, streams, chunk - first, count, scalars, place);
    }
}

}  // namespace fusedstep::cuda

#undef FUSEDSTEP_UNROLL
