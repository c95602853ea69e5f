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

// A gradient's element as the rule has it.
template <DType dtype>
FUSEDSTEP_INLINE double value_of(const char* element) {
    if constexpr (dtype == DType::float64) {
        return *reinterpret_cast<const double*>(element);
    } else if constexpr (dtype == DType::float32) {
        return *reinterpret_cast<const float*>(element);
    } else {
        using F = std::conditional_t<dtype == DType::bfloat16, BFloat16, Float16>;
        const U32 item(*reinterpret_cast<const uint16_t*>(element));
        return F::template decode<Vec<float>>(item).x;
    }
}

// A thread's lanes of a block: lane k of the block is number k / Team::threads of thread k % Team::threads.
template <class Team>
struct Lanes {
    static constexpr int count = norm_lanes / Team::threads;

    double sums[count] = {};
    int first;

    FUSEDSTEP_INLINE explicit Lanes(int thread) : first(thread % Team::threads) {}

    FUSEDSTEP_INLINE int lane(int i) const { return first + i * Team::threads; }

    FUSEDSTEP_INLINE void add_square(int i, double x) {
        sums[i] = fma(Vec<double>(x), Vec<double>(x), Vec<double>(sums[i])).x;
    }
};

template <DType dtype, class Team>
FUSEDSTEP_INLINE void add_squares(const char* gradient, const Walk& walk, int64_t begin, int count,
                                  Lanes<Team>& lanes) {
    constexpr int item = item_size_of<dtype>;
    constexpr int at_once = 16;  // reads on their way, so that the memory has much to do at a time
    int at = 0;
    if (walk.layout == nullptr) {
        for (; at + at_once * norm_lanes <= count; at += at_once * norm_lanes) {
            const char* const from = gradient + (begin + at) * item;
            FUSEDSTEP_UNROLL
            for (int i = 0; i < Lanes<Team>::count; ++i) {
                double values[at_once];
                FUSEDSTEP_UNROLL
                for (int j = 0; j < at_once; ++j)
                    values[j] = value_of<dtype>(from + (j * norm_lanes + lanes.lane(i)) * item);
                FUSEDSTEP_UNROLL
                for (int j = 0; j < at_once; ++j) lanes.add_square(i, values[j]);
            }
        }
    }
    for (; at < count; at += norm_lanes) {
        FUSEDSTEP_UNROLL
        for (int i = 0; i < Lanes<Team>::count; ++i) {
            const int64_t element = begin + at + lanes.lane(i);
            if (at + lanes.lane(i) >= count) continue;
            lanes.add_square(
                i, value_of<dtype>(gradient + (walk.layout == nullptr ? element * item : walk.offset(0, element))));
        }
    }
}

// Every team takes every so-manieth block.
template <class Table, class Team>
FUSEDSTEP_INLINE void sum_blocks(const Table& table, const Place& place, const Team& team) {
    const NormSums& sums = *table.template from_end<NormSums>(sizeof(NormSums));
    const NormEntry* const entries = table.template entries<NormEntry>();
    const uint32_t teams = place.threads / Team::threads;
    uint32_t i = 0;
    for (uint32_t block = place.block * teams + place.thread / Team::threads; block < table.chunks;
         block += place.blocks * teams) {
        i = tensor_of(entries, i, table.count, block);
        const NormEntry& entry = entries[i];
        const GradientKind& kind = *table.template from_end<GradientKind>(entry.kind);
        const Walk walk{kind.dimensions == 0 ? nullptr : &kind.dimensions};
        const int64_t begin = (block - (i == 0 ? 0 : entries[i - 1].chunks_end)) * norm_block;
        const int count = block + 1 == entry.chunks_end ? entry.last : static_cast<int>(norm_block);
        Lanes<Team> lanes(place.thread);
        switch (kind.dtype) {
            case DType::float32:
                add_squares<DType::float32>(entry.gradient, walk, begin, count, lanes);
                break;
            case DType::float64:
                add_squares<DType::float64>(entry.gradient, walk, begin, count, lanes);
                break;
            case DType::bfloat16:
                add_squares<DType::bfloat16>(entry.gradient, walk, begin, count, lanes);
                break;
            default:
                add_squares<DType::float16>(entry.gradient, walk, begin, count, lanes);
        }
        const double sum = sum_of_lanes(team, lanes.sums);
        if (lanes.first == 0) sums.blocks[block] = sum;
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
            Lanes<Team> lanes(place.thread);
            FUSEDSTEP_UNROLL
            for (int i = 0; i < Lanes<Team>::count; ++i) {
                const int64_t from = at * norm_lanes + lanes.lane(i);
                if (from < count) lanes.sums[i] = values[from];
            }
            const double sum = sum_of_lanes(team, lanes.sums);
            if (lanes.first == 0) spare[at] = sum;
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
        const uint32_t begin = i == 0 ? 0 : entries[i - 1].chunks_end;
        const double* const sum =
            sum_by_block(sums.blocks + begin, sums.spare + begin, entries[i].chunks_end - begin, place, team);
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
