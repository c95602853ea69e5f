// What each thread of a step's kernel does. A thread's place in the grid is an argument, so that tests can
// run this on the host; it exchanges values with the others of its team alone, where the streams are stored in
// blocks.
#pragma once

#include <cmath>

#include "../core/job.hpp"
#include "access.cuh"
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

// Steps `lanes` elements from element `at` on. Every stream is at a multiple of `aligned` bytes there.
template <class Rule, class T, int lanes, int aligned, class Scalars>
FUSEDSTEP_INLINE void step_pack(void* const* streams, int64_t at, const Scalars& scalars, bool zero_grad) {
    constexpr int bytes = lanes * static_cast<int>(sizeof(T));
    const auto memory = [&](int k) { return reinterpret_cast<char*>(static_cast<T*>(streams[k]) + at); };
    T packs[Rule::streams][lanes];
    FUSEDSTEP_UNROLL
    for (int k = 0; k < Rule::streams; ++k) read_elements<bytes, aligned>(memory(k), packs[k]);
    FUSEDSTEP_UNROLL
    for (int i = 0; i < lanes; ++i) {
        Vec<T> values[Rule::streams];
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) values[k] = Vec<T>(packs[k][i]);
        apply<Rule>(values, scalars);
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) packs[k][i] = values[k].x;
    }
    FUSEDSTEP_UNROLL
    for (int k = 0; k < Rule::streams; ++k) {
        if (Rule::written >> k & 1) write_elements<bytes, aligned>(packs[k], memory(k));
    }
    if (zero_grad) {
        constexpr T zeros[lanes] = {};
        write_elements<bytes, aligned>(zeros, memory(gradient_stream));
    }
}

// Of a tensor: elements `begin` to `end`. Those before the first are none, where the pack that it lies in begins.
struct Chunk {
    int64_t begin, end;
};

// Only the first and the last pack of a tensor can be partial.
template <class Rule, class T, int aligned, class Scalars>
FUSEDSTEP_INLINE void step_packs(void* const* streams, const Chunk& chunk, const Scalars& scalars, bool zero_grad,
                                 const Place& place) {
    constexpr int lanes = pack_lanes<T>;
    for (int64_t at = chunk.begin + place.thread * lanes; at < chunk.end; at += place.threads * lanes) {
        if (at >= 0 && at + lanes <= chunk.end) {
            step_pack<Rule, T, lanes, aligned>(streams, at, scalars, zero_grad);
        } else {
            for (int i = 0; i < lanes; ++i) {
                if (at + i >= 0 && at + i < chunk.end)
                    step_pack<Rule, T, 1, sizeof(T)>(streams, at + i, scalars, zero_grad);
            }
        }
    }
}

// Steps a chunk of a tensor, of all streams native and dense ...
template <class Rule, class T, class Table, class Shared, class Scalars, class Team>
FUSEDSTEP_INLINE void step_chunk(const Table& table, const Entry<Rule, Dense>&, const Shared&, void* const* streams,
                                 const Chunk& chunk, const Scalars& scalars, const Place& place, const Team&) {
    const auto address = [&](int k) { return reinterpret_cast<uintptr_t>(streams[k]); };
    bool alike = true;
    FUSEDSTEP_UNROLL
    for (int k = 1; k < Rule::streams; ++k) alike = alike && (address(k) - address(0)) % pack_bytes == 0;
    if (alike)
        step_packs<Rule, T, pack_bytes>(streams, chunk, scalars, table.zero_grad, place);
    else
        step_packs<Rule, T, sizeof(T)>(streams, chunk, scalars, table.zero_grad, place);
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
    for (int64_t at = chunk.begin + place.thread; at < chunk.end; at += place.threads) {
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

// Of one array, the elements of a pack that begins at element `at`: those from `first` to `end` are the tensor's. As
// words, in which they lie as in memory.
template <int lanes>
FUSEDSTEP_INLINE void read_pack(int item, const void* memory, const Walk& walk, int array, int64_t at, int first,
                                int end, uint32_t (&words)[lanes]) {
    const char* const from = static_cast<const char*>(memory);
    if (walk.layout == nullptr && first <= 0 && end >= lanes) {
        return with_item(item, [&](auto type) {
            read_elements<lanes * sizeof(type), sizeof(type)>(from + at * sizeof(type), words);
        });
    }
    FUSEDSTEP_UNROLL
    for (int i = 0; i < lanes; ++i) {
        uint32_t bits = 0;
        if (i >= first && i < end) {
            const int64_t offset = walk.layout == nullptr ? (at + i) * item : walk.offset(array, at + i);
            with_item(item, [&](auto type) { bits = *reinterpret_cast<const decltype(type)*>(from + offset); });
        }
        with_item(item, [&](auto type) { put_item_in<decltype(type)>(words, i, bits); });
    }
}

template <int lanes>
FUSEDSTEP_INLINE void write_pack(int item, void* memory, const Walk& walk, int array, int64_t at, int first, int end,
                                 const uint32_t (&words)[lanes]) {
    char* const to = static_cast<char*>(memory);
    if (walk.layout == nullptr && first <= 0 && end >= lanes) {
        return with_item(item, [&](auto type) {
            write_elements<lanes * sizeof(type), sizeof(type)>(words, to + at * sizeof(type));
        });
    }
    FUSEDSTEP_UNROLL
    for (int i = 0; i < lanes; ++i) {
        if (i < first || i >= end) continue;
        const int64_t offset = walk.layout == nullptr ? (at + i) * item : walk.offset(array, at + i);
        with_item(item, [&](auto type) {
            using Item = decltype(type);
            *reinterpret_cast<Item*>(to + offset) = static_cast<Item>(item_in<Item>(words, i));
        });
    }
}

// A thread's part of 64 elements of a tensor whose streams are not all native: a block of them, where its formats have
// blocks.
template <class Rule, class Formats, class Team>
class StoredBlock {
public:
    static constexpr int lanes = Formats::lanes;
    // The threads that share it, and what is a thread's: packs so many elements apart.
    static constexpr int threads =
        Team::threads < block_elements / lanes ? Team::threads : static_cast<int>(block_elements) / lanes;
    static constexpr int stride = threads * lanes;
    static constexpr int packs = static_cast<int>(block_elements) / stride;

    // From element `begin` on, which may be before the first, to `end`. There may be none of these, but the others of
    // the team wait for this thread.
    FUSEDSTEP_INLINE StoredBlock(const Formats& formats, void* const* arrays, const Walk& walk, int64_t begin,
                                 int64_t end, int thread)
        : formats_(formats),
          arrays_(arrays),
          walk_(walk),
          begin_(begin),
          before_first_(formats.in_blocks() || begin >= 0 ? 0 : static_cast<int>(-begin)),
          count_(static_cast<int>(end - begin < 0                ? 0
                                  : end - begin < block_elements ? end - begin
                                                                 : block_elements)),
          first_(thread % threads * lanes) {}

    template <class Scalars>
    FUSEDSTEP_INLINE void step(const Scalars& scalars, uint64_t random, bool zero_grad, const Team& team) {
        read();
        Vec<float> values[packs][Rule::streams][lanes];
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) {
            FUSEDSTEP_UNROLL
            for (int p = 0; p < packs; ++p) decode_pack(k, p, values[p][k]);
        }
        for_each_element(values, [&](auto& element) { Rule::update_state(element, scalars); });
        BlockScale<Vec<float>> scales[Rule::streams];
        bool coded[Rule::streams] = {};
        FUSEDSTEP_UNROLL
        for (int k = 2; k < Rule::streams; ++k) {
            if (is_blockwise(formats_.of(k))) scales[k] = scale_of_block(k, values, coded[k], team);
        }
        for_each_element(values, [&](auto& element) { Rule::update_parameter(element, scalars); });
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) {
            if ((Rule::written >> k & 1) == 0) continue;
            FUSEDSTEP_UNROLL
            for (int p = 0; p < packs; ++p) encode_pack(k, p, values[p][k], random, scales[k], coded[k]);
        }
        if (zero_grad) zero();
    }

private:
    // The first element of a pack in its block, and which of its own are the tensor's.
    FUSEDSTEP_INLINE int at(int pack) const { return first_ + pack * stride; }
    FUSEDSTEP_INLINE int first(int pack) const { return before_first_ - at(pack); }
    FUSEDSTEP_INLINE int end(int pack) const { return count_ - at(pack); }

    // Codes are vectors, whatever the layout of the parameter.
    FUSEDSTEP_INLINE Walk walk(int k) const { return is_blockwise(formats_.of(k)) ? Walk{nullptr} : walk_; }

    // What is beside the parameter.
    static constexpr int beside = Rule::streams;

    FUSEDSTEP_INLINE void read(int array, const Walk& walk, int item, int p, uint32_t (&words)[lanes]) const {
        read_pack(item, arrays_[array], walk, array, begin_ + at(p), first(p), end(p), words);
    }
    FUSEDSTEP_INLINE void write(int array, const Walk& walk, int item, int p, const uint32_t (&words)[lanes]) const {
        write_pack(item, arrays_[array], walk, array, begin_ + at(p), first(p), end(p), words);
    }

    // All of it before any is used, so that the memory has much to do at a time.
    FUSEDSTEP_INLINE void read() {
        FUSEDSTEP_UNROLL
        for (int k = 0; k < Rule::streams; ++k) {
            units_[k] = 0;
            if (is_blockwise(formats_.of(k)) && count_ > 0)
                units_[k] = static_cast<const float*>(arrays_[Rule::streams + k])[begin_ / block_elements];
            if (k == 0 && formats_.extra(0) == sizeof(float)) continue;  // its master is all that is read of it
            FUSEDSTEP_UNROLL
            for (int p = 0; p < packs; ++p) read(k, walk(k), formats_.item(k), p, words_[p][k]);
        }
        if (formats_.extra(0) == 0) return;
        FUSEDSTEP_UNROLL
        for (int p = 0; p < packs; ++p) read(beside, walk_, formats_.extra(0), p, words_beside_[p]);
    }

    FUSEDSTEP_INLINE void decode_pack(int k, int p, Vec<float> (&values)[lanes]) const {
        uint32_t items[lanes], extras[lanes] = {};
        items_in(formats_.item(k), words_[p][k], items);
        if (k == 0 && formats_.extra(0) != 0) items_in(formats_.extra(0), words_beside_[p], extras);
        decode(k, formats_.of(k), items, extras, units_[k], values);
    }

    FUSEDSTEP_INLINE void encode_pack(int k, int p, const Vec<float> (&values)[lanes], uint64_t random,
                                      const BlockScale<Vec<float>>& scale, bool coded) const {
        uint32_t items[lanes], extras[lanes], words[lanes];
        if (k == 2 && formats_.of(k) == Format::signed8)
            encode_codes<Signed8>(values, random, at(p), scale, coded, items);
        else if (k > 2 && formats_.of(k) == Format::unsigned8)
            encode_codes<Unsigned8>(values, random, at(p), scale, coded, items);
        else
            encode(k, formats_.of(k), values, random, at(p), items, extras);
        put_items_in(formats_.item(k), words, items);
        write(k, walk(k), formats_.item(k), p, words);
        if (k != 0 || formats_.extra(0) == 0) return;
        put_items_in(formats_.extra(0), words, extras);
        write(beside, walk_, formats_.extra(0), p, words);
    }

    // Sets the gradient to zero.
    FUSEDSTEP_INLINE void zero() const {
        constexpr uint32_t zeros[lanes] = {};
        FUSEDSTEP_UNROLL
        for (int p = 0; p < packs; ++p) write(gradient_stream, walk_, formats_.item(gradient_stream), p, zeros);
    }

    template <class Visit>
    FUSEDSTEP_INLINE static void for_each_element(Vec<float> (&values)[packs][Rule::streams][lanes],
                                                  const Visit& visit) {
        FUSEDSTEP_UNROLL
        for (int p = 0; p < packs; ++p) {
            FUSEDSTEP_UNROLL
            for (int i = 0; i < lanes; ++i) {
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
    FUSEDSTEP_INLINE BlockScale<Vec<float>> scale_of_block(int k,
                                                           const Vec<float> (&values)[packs][Rule::streams][lanes],
                                                           bool& coded, const Team& team) const {
        uint32_t greatest = 0;
        FUSEDSTEP_UNROLL
        for (int p = 0; p < packs; ++p) {
            FUSEDSTEP_UNROLL
            for (int i = 0; i < lanes; ++i) {
                const U32 value = bits_of(values[p][k][i]);
                const uint32_t bits = (k == 2 ? Signed8::size(value) : Unsigned8::size(value)).x;
                if (i < end(p) && bits > greatest) greatest = bits;
            }
        }
        greatest = greatest_of<threads>(team, greatest);
        coded = has_codes(greatest);
        const Vec<float> value = from_bits(U32(greatest));
        const BlockScale<Vec<float>> scale = k == 2 ? scale_of<Signed8>(value) : scale_of<Unsigned8>(value);
        if (first_ == 0 && count_ > 0) {
            static_cast<uint32_t*>(arrays_[Rule::streams + k])[begin_ / block_elements] =
                coded ? bits_of(scale.unit).x : unit_without_codes(greatest);
        }
        return scale;
    }

    const Formats& formats_;
    void* const* const arrays_;
    const Walk walk_;
    const int64_t begin_;
    const int before_first_, count_, first_;
    uint32_t words_[packs][Rule::streams][lanes], words_beside_[packs][lanes];
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
    const bool in_blocks = formats.in_blocks();
    for (int64_t turn = chunk.begin; turn < chunk.end; turn += place.threads / Block::threads * block_elements) {
        const int64_t begin = turn + place.thread / Block::threads * block_elements;
        Block block(formats, arrays, walk, begin, chunk.end, place.thread);
        block.step(scalars, in_blocks ? random_block(random, begin / block_elements) : 0, table.zero_grad, team);
    }
}

// The elements before a tensor's first that its first chunk begins with.
template <class Rule, class T, class Table, class Shared>
FUSEDSTEP_INLINE int lead_of(const Table&, const Entry<Rule, Dense>&, const Shared&, void* const* arrays) {
    return lead_of(arrays[0], sizeof(T));
}
template <class Rule, class T, class Table, class Shared>
FUSEDSTEP_INLINE int lead_of(const Table&, const Entry<Rule, Strided>&, const Shared&, void* const*) {
    return 0;
}
template <class Rule, class T, class Table, class E, class Shared>
FUSEDSTEP_INLINE int lead_of(const Table& table, const E& entry, const Shared& shared, void* const* arrays) {
    const typename FormatsOf<typename E::Placed>::Type formats(shared, Rule::streams);
    const bool in_packs = walk_of(table, entry).layout == nullptr && !formats.in_blocks();
    return in_packs ? lead_of(arrays[0], formats.item(0)) : 0;
}

// Sets memory to zero, 16 bytes at a time but for the ends, which hold whole items of two bytes.
FUSEDSTEP_INLINE void zero_memory(char* memory, int bytes, const Place& place) {
    constexpr uint32_t zeros[pack_bytes / sizeof(uint32_t)] = {};
    constexpr int item = sizeof(uint16_t);
    for (int at = place.thread * pack_bytes - lead_of(memory, 1); at < bytes; at += place.threads * pack_bytes) {
        if (at >= 0 && at + pack_bytes <= bytes) {
            write_elements<pack_bytes, pack_bytes>(zeros, memory + at);
            continue;
        }
        for (int i = at; i < at + pack_bytes; i += item) {
            if (i >= 0 && i < bytes) *reinterpret_cast<uint16_t*>(memory + i) = 0;
        }
    }
}

// Sets the gradient in a chunk to zero, without a step.
template <class T, class Table, class E>
FUSEDSTEP_INLINE void zero_chunk(const Table& table, const E& entry, int item, void* const* arrays, const Chunk& chunk,
                                 const Place& place) {
    char* const gradient = static_cast<char*>(arrays[gradient_stream]);
    const int64_t begin = chunk.begin < 0 ? 0 : chunk.begin;
    const Walk walk = walk_of(table, entry);
    if (walk.layout == nullptr)
        return zero_memory(gradient + begin * item, static_cast<int>(chunk.end - begin) * item, place);
    for (int64_t at = begin + place.thread; at < chunk.end; at += place.threads) {
        char* const element = gradient + walk.offset(gradient_stream, at);
        if (item == sizeof(uint16_t))
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
        const int64_t begin = (number - first) * chunk_elements<T> - lead_of<Rule, T>(table, entry, shared, arrays);
        const Chunk chunk{begin, begin + (number + 1 == entry.chunks_end ? entry.last : chunk_elements<T>)};
        if (skipped)
            zero_chunk<T>(table, entry, item_bytes(shared, gradient_stream), arrays, chunk, place);
        else
            step_chunk<Rule, T>(table, entry, shared, arrays, chunk, scalars, place, team);
    }
}

}  // namespace fusedstep::cuda
