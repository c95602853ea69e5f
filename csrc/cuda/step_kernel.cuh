// What each thread of a step's kernel does. A thread's place in the grid is an argument, so that tests can
// run this on the host; it exchanges values with the others of its team alone, where the streams are stored in
// blocks.
#pragma once

#include <cmath>

#include "../core/job.hpp"
#include "step_table.hpp"
#include "stored_streams.cuh"
#include "team.hpp"
#include "unroll.hpp"
#include "vec_cuda.hpp"

namespace fusedstep::cuda {

struct Place {
    uint32_t block, blocks;
    int thread, threads;
};

// Steps the elements of the pack at element `at`.
template <class Rule, class T, int lanes, class Scalars>
FUSEDSTEP_INLINE void step_pack(void* const* streams, int64_t at, const Scalars& scalars, bool zero_grad) {
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
    if (zero_grad)
        *reinterpret_cast<Pack<T, lanes>*>(static_cast<T*>(streams[gradient_stream]) + at) = Pack<T, lanes>{};
}

// The elements of the pack in which a tensor begins that are before it.
template <class T, class Rule>
FUSEDSTEP_INLINE int lead_of(const Entry<Rule, Dense>&, void* const* streams) {
    const int lead = common_lead<T>(streams, Rule::streams);
    return lead < 0 ? 0 : lead;
}
template <class T, class Rule, class Placing>
FUSEDSTEP_INLINE int lead_of(const Entry<Rule, Placing>&, void* const*) {
    return 0;
}

// Steps one chunk of a dense tensor: elements from `begin`, which is before the first where that lies past a
// pack boundary, to `end`. Only the first and the last pack of a tensor can be partial.
template <class Rule, class T, int lanes, class Scalars>
FUSEDSTEP_INLINE void step_packs(void* const* streams, int64_t begin, int64_t end, const Scalars& scalars,
                                 bool zero_grad, const Place& place) {
    for (int64_t at = begin + place.thread * lanes; at < end; at += place.threads * lanes) {
        if (at >= 0 && at + lanes <= end) {
            step_pack<Rule, T, lanes>(streams, at, scalars, zero_grad);
        } else {
            for (int i = 0; i < lanes; ++i) {
                if (at + i >= 0 && at + i < end) step_pack<Rule, T, 1>(streams, at + i, scalars, zero_grad);
            }
        }
    }
}

// Of a tensor, counted from the pack boundary at or below its first element where it has a lead.
struct Chunk {
    int64_t begin, count;
};

// Steps a chunk of a tensor, of all streams native and dense ...
template <class Rule, class T, class Table, class Shared, class Scalars, class Team>
FUSEDSTEP_INLINE void step_chunk(const Table& table, const Entry<Rule, Dense>&, const Shared&, void* const* streams,
                                 const Chunk& chunk, const Scalars& scalars, const Place& place, const Team&) {
    const int lead = common_lead<T>(streams, Rule::streams);
    const int64_t begin = chunk.begin - (lead < 0 ? 0 : lead);
    const int64_t end = begin + chunk.count;
    if (lead < 0)
        step_packs<Rule, T, 1>(streams, begin, end, scalars, table.zero_grad, place);
    else
        step_packs<Rule, T, pack_lanes<T>>(streams, begin, end, scalars, table.zero_grad, place);
}

// In a table: how the arrays of a tensor are walked. Null: they are dense.
struct Walk {
    const int64_t* layout;

    // Bytes from an array's base to an element.
    FUSEDSTEP_INLINE int64_t offset(int array, int64_t element) const {
        const int dimensions = static_cast<int>(layout[0]);
        const int64_t* const shape = layout + 1;
        const int64_t* const strides = shape + (array + 1) * dimensions;
        uint64_t rest = static_cast<uint64_t>(element);
        int64_t offset = 0;
        FUSEDSTEP_KEEP_LOOP
        for (int d = dimensions - 1; d >= 0; --d) {
            const uint64_t length = static_cast<uint64_t>(shape[d]);
            const uint64_t next = rest / length;
            offset += static_cast<int64_t>(rest - next * length) * strides[d];
            rest = next;
        }
        return offset;
    }
};

template <class Rule, class Table>
FUSEDSTEP_INLINE Walk walk_of(const Table&, const Entry<Rule, Dense>&) {
    return {nullptr};
}
template <class Rule, class Table, Format... formats>
FUSEDSTEP_INLINE Walk walk_of(const Table&, const Entry<Rule, StoredAs<formats...>>&) {
    return {nullptr};
}
template <class Rule, class Table>
FUSEDSTEP_INLINE Walk walk_of(const Table& table, const Entry<Rule, Strided>& entry) {
    return {table.template from_end<int64_t>(entry.layout)};
}
template <class Rule, class Table>
FUSEDSTEP_INLINE Walk walk_of(const Table& table, const Entry<Rule, Stored>& entry) {
    return {entry.layout == 0 ? nullptr : table.template from_end<int64_t>(entry.layout)};
}

// ... of streams with strides of their own ...
template <class Rule, class T, class Table, class Shared, class Scalars, class Team>
FUSEDSTEP_INLINE void step_chunk(const Table& table, const Entry<Rule, Strided>& entry, const Shared&,
                                 void* const* streams, const Chunk& chunk, const Scalars& scalars, const Place& place,
                                 const Team&) {
    const int64_t* const layout = walk_of(table, entry).layout;
    const int dimensions = static_cast<int>(layout[0]);
    const int64_t* const shape = layout + 1;
    const int64_t* const strides = shape + dimensions;
    for (int64_t at = chunk.begin + place.thread; at < chunk.begin + chunk.count; at += place.threads) {
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
        if (table.zero_grad) *reinterpret_cast<T*>(elements[gradient_stream]) = T(0);
    }
}

// Elements that a thread reads of a stream at once, where streams are not all native.
constexpr int stored_lanes = 4;

// The items of one array at elements [at, at + count), as bits.
template <int lanes>
FUSEDSTEP_INLINE void read_array(int item, const void* memory, const Walk& walk, int array, int64_t at, int count,
                                 uint32_t (&bits)[lanes]) {
    const char* const from = static_cast<const char*>(memory);
    if (walk.layout == nullptr) return read_items(item, from + at * item, count, bits);
    FUSEDSTEP_UNROLL
    for (int i = 0; i < lanes; ++i) {
        if (i >= count) continue;
        uint32_t one[1];
        read_items(item, from + walk.offset(array, at + i), 1, one);
        bits[i] = one[0];
    }
}

template <int lanes>
FUSEDSTEP_INLINE void write_array(int item, void* memory, const Walk& walk, int array, int64_t at, int count,
                                  const uint32_t (&bits)[lanes]) {
    char* const to = static_cast<char*>(memory);
    if (walk.layout == nullptr) return write_items(item, to + at * item, count, bits);
    FUSEDSTEP_UNROLL
    for (int i = 0; i < lanes; ++i) {
        if (i >= count) continue;
        const uint32_t one[1] = {bits[i]};
        write_items(item, to + walk.offset(array, at + i), 1, one);
    }
}

// A thread's part of a block of 64 elements of a tensor whose streams are not all native.
template <class Rule, class Formats, class Team>
class StoredBlock {
public:
    // The threads that share a block, and what is a thread's of it: packs so many elements apart.
    static constexpr int threads =
        Team::threads < block_elements / stored_lanes ? Team::threads : static_cast<int>(block_elements) / stored_lanes;
    static constexpr int stride = threads * stored_lanes;
    static constexpr int packs = static_cast<int>(block_elements) / stride;

    // `count` elements from `begin` on; that may be none, but the others of the team wait for this thread.
    FUSEDSTEP_INLINE StoredBlock(const Formats& formats, void* const* arrays, const Walk& walk, int64_t begin,
                                 int64_t count, int thread)
        : formats_(formats),
          arrays_(arrays),
          walk_(walk),
          begin_(begin),
          count_(static_cast<int>(count < 0 ? 0 : count)),
          first_(thread % threads * stored_lanes) {}

    template <class Scalars>
    FUSEDSTEP_INLINE void step(const Scalars& scalars, uint64_t random, bool zero_grad, const Team& team) {
        read();
        Vec<float> values[packs][Rule::streams][stored_lanes];
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) {
            FUSEDSTEP_UNROLL
            for (int p = 0; p < packs; ++p)
                decode(k, formats_.of(k), items_[p][k], extras_[p][k], units_[k], values[p][k]);
        }
        for_each_element(values, [&](auto& element) { Rule::update_state(element, scalars); });
        BlockScale<Vec<float>> scales[Rule::streams];
        bool finite[Rule::streams] = {};
        FUSEDSTEP_UNROLL
        for (int k = 2; k < Rule::streams; ++k) {
            if (is_blockwise(formats_.of(k))) scales[k] = scale_of_block(k, values, finite[k], team);
        }
        for_each_element(values, [&](auto& element) { Rule::update_parameter(element, scalars); });
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) {
            if ((Rule::written >> k & 1) == 0) continue;
            FUSEDSTEP_UNROLL
            for (int p = 0; p < packs; ++p) {
                if (k == 2 && formats_.of(k) == Format::signed8)
                    encode_codes<Signed8>(values[p][k], random, at(p), scales[k], finite[k], items_[p][k]);
                else if (k > 2 && formats_.of(k) == Format::unsigned8)
                    encode_codes<Unsigned8>(values[p][k], random, at(p), scales[k], finite[k], items_[p][k]);
                else
                    encode(k, formats_.of(k), values[p][k], random, at(p), items_[p][k], extras_[p][k]);
                write(k, p);
            }
        }
        if (zero_grad) zero();
    }

    // Sets the gradient to zero.
    FUSEDSTEP_INLINE void zero() const {
        constexpr uint32_t zeros[stored_lanes] = {};
        FUSEDSTEP_UNROLL
        for (int p = 0; p < packs; ++p) {
            write_array(formats_.item(gradient_stream), arrays_[gradient_stream], walk_, gradient_stream,
                        begin_ + at(p), count(p), zeros);
        }
    }

private:
    // The first element of a pack in its block, and how many it has.
    FUSEDSTEP_INLINE int at(int pack) const { return first_ + pack * stride; }
    FUSEDSTEP_INLINE int count(int pack) const {
        const int left = count_ - at(pack);
        return left < 0 ? 0 : left < stored_lanes ? left : stored_lanes;
    }

    // Codes are vectors, whatever the layout of the parameter.
    FUSEDSTEP_INLINE Walk walk(int k) const { return is_blockwise(formats_.of(k)) ? Walk{nullptr} : walk_; }

    // All of it before any is used, so that the memory has much to do at a time.
    FUSEDSTEP_INLINE void read() {
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) {
            units_[k] = 0;
            if (is_blockwise(formats_.of(k)) && count_ > 0)
                units_[k] = static_cast<const float*>(arrays_[Rule::streams + k])[begin_ / block_elements];
            FUSEDSTEP_UNROLL
            for (int p = 0; p < packs; ++p) {
                FUSEDSTEP_UNROLL
                for (int i = 0; i < stored_lanes; ++i) items_[p][k][i] = extras_[p][k][i] = 0;
                read_array(formats_.item(k), arrays_[k], walk(k), k, begin_ + at(p), count(p), items_[p][k]);
                if (k == 0 && formats_.extra(0) != 0)
                    read_array(formats_.extra(0), arrays_[Rule::streams], walk_, Rule::streams, begin_ + at(p),
                               count(p), extras_[p][0]);
            }
        }
    }

    FUSEDSTEP_INLINE void write(int k, int p) const {
        write_array(formats_.item(k), arrays_[k], walk(k), k, begin_ + at(p), count(p), items_[p][k]);
        if (k == 0 && formats_.extra(0) != 0)
            write_array(formats_.extra(0), arrays_[Rule::streams], walk_, Rule::streams, begin_ + at(p), count(p),
                        extras_[p][0]);
    }

    template <class Visit>
    FUSEDSTEP_INLINE static void for_each_element(Vec<float> (&values)[packs][Rule::streams][stored_lanes],
                                                  const Visit& visit) {
        FUSEDSTEP_UNROLL
        for (int p = 0; p < packs; ++p) {
            FUSEDSTEP_UNROLL
            for (int i = 0; i < stored_lanes; ++i) {
                Vec<float> element[Rule::streams];
                FUSEDSTEP_UNROLL
                for (int k = 0; k < Rule::streams; ++k) element[k] = values[p][k][i];
                visit(element);
                FUSEDSTEP_UNROLL
                for (int k = 0; k < Rule::streams; ++k) values[p][k][i] = element[k];
            }
        }
    }

    // Of the greatest value of the block's elements; one thread writes its unit. All have read the old one.
    FUSEDSTEP_INLINE BlockScale<Vec<float>> scale_of_block(
        int k, const Vec<float> (&values)[packs][Rule::streams][stored_lanes], bool& finite, const Team& team) const {
        uint32_t greatest = 0;
        FUSEDSTEP_UNROLL
        for (int p = 0; p < packs; ++p) {
            FUSEDSTEP_UNROLL
            for (int i = 0; i < stored_lanes; ++i) {
                const U32 value = bits_of(values[p][k][i]);
                const uint32_t bits = (k == 2 ? Signed8::size(value) : Unsigned8::size(value)).x;
                if (i < count(p) && bits > greatest) greatest = bits;
            }
        }
        greatest = greatest_of<threads>(team, greatest);
        finite = is_finite_block(greatest);
        const Vec<float> value = from_bits(U32(greatest));
        const BlockScale<Vec<float>> scale = k == 2 ? scale_of<Signed8>(value) : scale_of<Unsigned8>(value);
        if (first_ == 0 && count_ > 0) {
            static_cast<uint32_t*>(arrays_[Rule::streams + k])[begin_ / block_elements] =
                finite ? bits_of(scale.unit).x : nan_bits;
        }
        return scale;
    }

    const Formats& formats_;
    void* const* const arrays_;
    const Walk walk_;
    const int64_t begin_;
    const int count_, first_;
    uint32_t items_[packs][Rule::streams][stored_lanes], extras_[packs][Rule::streams][stored_lanes];
    float units_[Rule::streams];
};

// ... or stored otherwise. Every thread of a block of threads takes every turn, since teams exchange values.
template <class Rule, class T, class Table, class E, class Shared, class Scalars, class Team>
FUSEDSTEP_INLINE void step_chunk(const Table& table, const E& entry, const Shared& shared, void* const* arrays,
                                 const Chunk& chunk, const Scalars& scalars, const Place& place, const Team& team) {
    using Formats = typename FormatsOf<typename E::Placed>::Type;
    using Block = StoredBlock<Rule, Formats, Team>;
    const Formats formats(shared, Rule::streams);
    const Walk walk = walk_of(table, entry);
    const uint64_t random = shared.random_on_gpu != nullptr ? *shared.random_on_gpu : shared.random;
    bool draws = false;
    FUSEDSTEP_UNROLL
    for (int k = 0; k < Rule::streams; ++k) draws = draws || is_random(formats.of(k));
    const int64_t end = chunk.begin + chunk.count;
    for (int64_t turn = chunk.begin; turn < end; turn += place.threads / Block::threads * block_elements) {
        const int64_t begin = turn + place.thread / Block::threads * block_elements;
        const int64_t count = end - begin < block_elements ? end - begin : block_elements;
        Block block(formats, arrays, walk, begin, count, place.thread);
        block.step(scalars, draws ? random_block(random, begin / block_elements) : 0, table.zero_grad, team);
    }
}

// Sets the gradient in a chunk to zero, without a step.
template <class T, class Table, class E>
FUSEDSTEP_INLINE void zero_chunk(const Table& table, const E& entry, int item, void* const* arrays, const Chunk& chunk,
                                 const Place& place) {
    const Walk walk = walk_of(table, entry);
    char* const gradient = static_cast<char*>(arrays[gradient_stream]);
    const int64_t begin = chunk.begin - lead_of<T>(entry, arrays);
    for (int64_t at = begin + place.thread; at < begin + chunk.count; at += place.threads) {
        if (at < 0) continue;
        char* const element = gradient + (walk.layout == nullptr ? at * item : walk.offset(gradient_stream, at));
        if (item == 2)
            *reinterpret_cast<uint16_t*>(element) = 0;
        else
            *reinterpret_cast<T*>(element) = T(0);
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

// Bytes of an element of an array: of a stream, or of what is beside one.
template <class T, class Rule, class Placing>
FUSEDSTEP_INLINE int item_bytes(const Shared<Rule, T, Placing>& shared, int array) {
    if constexpr (Placing::arrays == 1)
        return sizeof(T);
    else
        return shared.items[array];
}

template <class Rule, class T, class Placing, class Table, class Team>
FUSEDSTEP_INLINE void step_table(const Table& table, const Place& place, const Team& team) {
    using E = Entry<Rule, Placing>;
    using S = Shared<Rule, T, Placing>;
    const bool skipped = table.norm != nullptr && table.norm->skipped;
    if (skipped && !table.zero_grad) return;
    const E* const entries = table.template entries<E>();
    uint32_t i = 0;
    for (uint32_t number = place.block; number < table.chunks; number += place.blocks) {
        i = tensor_of(entries, i, table.count, number);
        const E& entry = entries[i];
        const S& shared = *table.template from_end<S>(entry.shared);
        void* arrays[Placing::arrays * Rule::streams];
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Placing::arrays * Rule::streams; ++k) {
            arrays[k] = shared.bases[k] + uint64_t{entry.places[k]} * item_bytes(shared, k);
        }
        typename S::Scalars scalars = shared.on_gpu != nullptr ? *shared.on_gpu : shared.scalars;
        if (table.norm != nullptr)  // the sign says which way to go
            scalars.grad_scale = std::copysign(static_cast<T>(table.norm->grad_scale), scalars.grad_scale);
        const uint32_t first = i == 0 ? 0 : entries[i - 1].chunks_end;
        const Chunk chunk{(number - first) * chunk_elements<T>,
                          number + 1 == entry.chunks_end ? int64_t{entry.last} : chunk_elements<T>};
        if (skipped)
            zero_chunk<T>(table, entry, item_bytes(shared, gradient_stream), arrays, chunk, place);
        else
            step_chunk<Rule, T>(table, entry, shared, arrays, chunk, scalars, place, team);
    }
}

}  // namespace fusedstep::cuda
