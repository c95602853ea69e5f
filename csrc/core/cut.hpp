// Cutting a job's concatenated elements into pieces.
#pragma once

#include <algorithm>

#include "job.hpp"

namespace fusedstep {

// Pieces start at a multiple of this many elements of their tensor: a block, and a cache line of the narrowest type.
constexpr int64_t cut_alignment = 64;

struct Position {
    int64_t tensor, element;
};

// The place in the job nearest below element `at` of the concatenation where a cut may be made.
inline Position cut_at(const Job& job, int64_t at) {
    if (at >= job.elements()) return {job.count, 0};
    const int64_t tensor = std::upper_bound(job.ends, job.ends + job.count, at) - job.ends;
    const int64_t element = at - (tensor == 0 ? 0 : job.ends[tensor - 1]);
    return {tensor, element / cut_alignment * cut_alignment};
}

// Calls visit(tensor, begin, count) for every run of elements between two positions.
template <class Visit>
void for_each_run(const Job& job, Position from, Position to, Visit visit) {
    for (int64_t i = from.tensor; i < job.count && i <= to.tensor; ++i) {
        const int64_t begin = i == from.tensor ? from.element : 0;
        const int64_t end = i == to.tensor ? to.element : job.tensors[i].size;
        if (begin < end) visit(job.tensors[i], begin, end - begin);
    }
}

}  // namespace fusedstep
