// The sum of the squares of all gradients of a call; core/norm.hpp says in which order they are added.
#pragma once

#include <vector>

#include "../core/job.hpp"

namespace fusedstep::cpu {

// Keeps its memory from call to call.
class GradientNorm {
public:
    void clear();

    // Of a tensor that stays where it is until the sum has been taken; `dtype` is its job's.
    void add(const Tensor& tensor, DType dtype);

    double sum_of_squares();

    // The sum of each block by itself, gradient after gradient.
    const std::vector<double>& sums_of_blocks();

private:
    struct Gradient {
        const Tensor* tensor;
        DType dtype;
    };

    void sum_blocks(int64_t begin, int64_t end);

    std::vector<Gradient> gradients_;
    std::vector<int64_t> ends_;  // ends_[i]: the number of blocks in gradients 0 to i
    std::vector<double> sums_;   // of each block
    int64_t bytes_ = 0;
};

}  // namespace fusedstep::cpu
