// The norm of the gradients, added in the tree of core/norm.hpp: the sum of each block of a gradient, of the blocks of
// each gradient, and of the gradients, each in a launch of its own. As step_kernel.cuh, it compiles for the host too.
#pragma once

#include "../formats/bfloat16.hpp"
#include "../formats/float16.hpp"
#include "norm_table.hpp"
#include "step_kernel.cuh"

namespace fusedstep::cuda {

template <DType dtype>
constexpr int item_size_of = item_size(dtype);

// The elements of a gradient in 16 bytes, or more: as words in which they lie as in memory.
template <DType dtype>
using WordOf =
    std::conditional_t<dtype == DType::float64, double, std::conditional_t<dtype == DType::float32, float, uint32_t>>;

// An element as the rule has it.
template <DType dtype, int length>
FUSEDSTEP_INLINE double value_in(const WordOf<dtype> (&words)[length], int i) {
    if constexpr (item_size_of<dtype> == 2) {
        using F = std::conditional_t<dtype == DType::bfloat16, BFloat16, Float16>;
        return F::template decode<Vec<float>>(U32(item_in<uint16_t>(words, i))).x;
    } else {
        return words[i];
    }
}

// A thread's part of a block of the norm. Its elements in memory are rows of all lanes of the tree, and what is 16
// bytes of one row is 16 bytes of the next: a thread adds to neighbouring lanes, which are always the same, and few
// threads share a block.
template <DType dtype, class Team>
class NormBlock {
public:
    static constexpr int item = item_size_of<dtype>;
    static constexpr int threads =
        Team::threads < norm_lanes * item / pack_bytes ? Team::threads : norm_lanes * item / pack_bytes;
    static constexpr int lanes = norm_lanes / threads;

    // Of `count` elements of the gradient from element `begin` on. There may be none, but the others of the team wait
    // for this thread.
    FUSEDSTEP_INLINE NormBlock(const char* gradient, const Walk& walk, int64_t begin, int count, int thread)
        : gradient_(gradient), walk_(walk), begin_(begin), count_(count), first_(thread % threads * lanes) {}

    // Rows begin at 16-byte boundaries of memory, `lead` elements before the block's first.
    FUSEDSTEP_INLINE double sum(const Team& team) {
        const int lead = walk_.layout == nullptr ? lead_of(gradient_, item) : 0;
        if (walk_.layout == nullptr)
            add_packs(first_ - lead);
        else
            add_strided();
        // Lane 0 of the tree to the first place of a row.
        FUSEDSTEP_KEEP_LOOP
        for (int i = 0; i < lead; ++i) {
            const double next = team.template next<threads>(sums_[0]);
            FUSEDSTEP_UNROLL
            for (int j = 0; j + 1 < lanes; ++j) sums_[j] = sums_[j + 1];
            sums_[lanes - 1] = next;
        }
        return sum_of_lanes<threads>(team, sums_);
    }

private:
    static constexpr int words = lanes * item / static_cast<int>(sizeof(WordOf<dtype>));
    static constexpr int rows_at_once = 16;  // reads on their way, so that the memory has much to do at a time

    FUSEDSTEP_INLINE void add(const WordOf<dtype> (&row)[words]) {
        FUSEDSTEP_UNROLL
        for (int i = 0; i < lanes; ++i) {
            const Vec<double> x(value_in<dtype>(row, i));
            sums_[i] = fma(x, x, Vec<double>(sums_[i])).x;
        }
    }

    // From element `at` of the block on, which may be before the first, those of every row. What is not the block's
    // adds nothing as 0.
    FUSEDSTEP_INLINE void add_packs(int at) {
        if (at < 0) add_elements(at);
        const int rest = (count_ - at) % norm_lanes;
        for (; at + lanes <= count_; at += rows_at_once * norm_lanes) {
            WordOf<dtype> rows[rows_at_once][words];
            FUSEDSTEP_UNROLL
            for (int j = 0; j < rows_at_once; ++j) {
                const int from = at + j * norm_lanes;
                FUSEDSTEP_UNROLL
                for (int i = 0; i < words; ++i) rows[j][i] = 0;
                if (from >= 0 && from + lanes <= count_)
                    read_elements<lanes * item, pack_bytes>(gradient_ + (begin_ + from) * item, rows[j]);
            }
            FUSEDSTEP_UNROLL
            for (int j = 0; j < rows_at_once; ++j) add(rows[j]);
        }
        if (0 < rest && rest < lanes && rest <= count_) add_elements(count_ - rest);
    }

    FUSEDSTEP_INLINE void add_strided() {
        FUSEDSTEP_KEEP_LOOP
        for (int at = first_; at < count_; at += norm_lanes) add_elements(at);
    }

    // Of a row, one by one.
    FUSEDSTEP_INLINE void add_elements(int at) {
        using Item = std::conditional_t<item == 2, uint16_t, WordOf<dtype>>;
        WordOf<dtype> row[words];
        FUSEDSTEP_UNROLL
        for (int i = 0; i < lanes; ++i) {
            Item element = 0;
            if (at + i >= 0 && at + i < count_) {
                const int64_t number = begin_ + at + i;
                const int64_t offset = walk_.layout == nullptr ? number * item : walk_.offset(0, number);
                element = *reinterpret_cast<const Item*>(gradient_ + offset);
            }
            if constexpr (item == 2)
                put_item_in<Item>(row, i, element);
            else
                row[i] = element;
        }
        add(row);
    }

    const char* const gradient_;
    const Walk& walk_;
    const int64_t begin_;
    const int count_, first_;
    double sums_[lanes] = {};
};

// Adds up the blocks of a chunk of a gradient.
template <DType dtype, class Team>
FUSEDSTEP_INLINE void sum_chunk(const NormEntry& entry, const Walk& walk, uint32_t chunk, uint32_t blocks, double* sums,
                                int thread, const Team& team) {
    using Block = NormBlock<dtype, Team>;
    constexpr int at_once = Team::threads / Block::threads;
    FUSEDSTEP_KEEP_LOOP
    for (int k = 0; k < blocks_of_chunk<dtype>; k += at_once) {
        const uint32_t number = chunk * blocks_of_chunk<dtype> + k + thread % Team::threads / Block::threads;
        const int count = number + 1 < blocks ? static_cast<int>(norm_block) : number + 1 == blocks ? entry.last : 0;
        const double sum = Block(entry.gradient, walk, number * norm_block, count, thread).sum(team);
        if (count > 0 && thread % Block::threads == 0) sums[number] = sum;
    }
}

// Every team takes every so-manieth chunk.
template <class Table, class Team>
FUSEDSTEP_INLINE void sum_blocks(const Table& table, const Place& place, const Team& team) {
    const NormSums& sums = *table.template from_end<NormSums>(sizeof(NormSums));
    const NormEntry* const entries = table.template entries<NormEntry>();
    const uint32_t teams = place.threads / Team::threads;
    uint32_t i = 0;
    for (uint32_t number = place.block * teams + place.thread / Team::threads; number < table.chunks;
         number += place.blocks * teams) {
        i = tensor_of(entries, i, table.count, number);
        const NormEntry& entry = entries[i];
        const GradientKind& kind = *table.template from_end<GradientKind>(entry.kind);
        const Walk walk{kind.dimensions == 0 ? nullptr : &kind.dimensions};
        const uint32_t first = blocks_before(entries, i), blocks = entry.blocks_end - first;
        const uint32_t chunk = number - (i == 0 ? 0 : entries[i - 1].chunks_end);
        const auto sum = [&](auto dtype) {
            sum_chunk<decltype(dtype)::value>(entry, walk, chunk, blocks, sums.blocks + first, place.thread, team);
        };
        switch (kind.dtype) {
            case DType::float32:
                sum(std::integral_constant<DType, DType::float32>{});
                break;
            case DType::float64:
                sum(std::integral_constant<DType, DType::float64>{});
                break;
            case DType::bfloat16:
                sum(std::integral_constant<DType, DType::bfloat16>{});
                break;
            default:
                sum(std::integral_constant<DType, DType::float16>{});
        }
    }
}

// Adds values in pairs, as core/norm.hpp does, by all threads of a block of threads; overwrites them. Returns where the
// sum is. `spare` has room for as many.
template <class Team>
FUSEDSTEP_INLINE const double* sum_by_block(double* values, double* spare, int64_t count, const Place& place,
                                            const Team& team) {
    while (count > 1) {
        const int64_t sums = (count + norm_lanes - 1) / norm_lanes;
        for (int64_t at = place.thread / Team::threads; at < sums; at += place.threads / Team::threads) {
            constexpr int lanes = norm_lanes / Team::threads;
            const int first = place.thread % Team::threads * lanes;
            double added[lanes];
            FUSEDSTEP_UNROLL
            for (int i = 0; i < lanes; ++i) {
                const int64_t from = at * norm_lanes + first + i;
                added[i] = from < count ? values[from] : 0.0;
            }
            const double sum = sum_of_lanes<Team::threads>(team, added);
            if (first == 0) spare[at] = sum;
        }
        team.wait_for_block();
        double* const summed = spare;
        spare = values;
        values = summed;
        count = sums;
    }
    return values;
}

// Every block of threads takes every so-manieth gradient.
template <class Table, class Team>
FUSEDSTEP_INLINE void sum_gradients(const Table& table, const Place& place, const Team& team) {
    const NormSums& sums = *table.template from_end<NormSums>(sizeof(NormSums));
    const NormEntry* const entries = table.template entries<NormEntry>();
    for (uint32_t i = place.block; i < table.count; i += place.blocks) {
        const uint32_t begin = blocks_before(entries, i);
        const double* const sum =
            sum_by_block(sums.blocks + begin, sums.spare + begin, entries[i].blocks_end - begin, place, team);
        if (place.thread == 0) sums.gradients[i] = *sum;
    }
}

// What is left to do when each gradient has been added up, for one block of threads.
struct NormEnd {
    double* sums;  // of the gradients, and as much memory behind them
    int64_t count;
    NormOutcome* outcome;
    NormOptions options;
};

template <class Team>
FUSEDSTEP_INLINE void end_norm(const NormEnd& norm, const Place& place, const Team& team) {
    const double* const sum = sum_by_block(norm.sums, norm.sums + norm.count, norm.count, place, team);
    if (place.thread == 0) *norm.outcome = outcome_of(norm.count == 0 ? 0.0 : *sum, norm.options);
}

}  // namespace fusedstep::cuda
