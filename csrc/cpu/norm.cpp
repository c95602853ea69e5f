#include "norm.hpp"

#include <algorithm>

#include "../core/norm.hpp"
#include "dispatch.hpp"
#include "float_environment.hpp"
#include "parallel_for.hpp"
#include "tile.hpp"

namespace fusedstep::cpu {

void GradientNorm::clear() {
    gradients_.clear();
    ends_.clear();
    bytes_ = 0;
}

void GradientNorm::add(const Tensor& tensor, DType dtype) {
    if (tensor.size == 0) return;
    const int64_t blocks = (tensor.size + norm_block - 1) / norm_block;
    gradients_.push_back({&tensor, dtype});
    ends_.push_back((ends_.empty() ? 0 : ends_.back()) + blocks);
    bytes_ += tensor.size * item_size(dtype);
}

double GradientNorm::sum_of_squares() {
    const int64_t blocks = ends_.empty() ? 0 : ends_.back();
    sums_.resize(blocks);
    parallel_for(blocks * norm_block, bytes_, [&](int64_t from, int64_t to) {
        const FloatEnvironment ieee;
        for (int64_t block = from / norm_block; block < to / norm_block; ++block) sum_block(block);
    });
    const FloatEnvironment ieee;
    int64_t begin = 0;
    for (size_t i = 0; i < gradients_.size(); begin = ends_[i++]) {
        sums_[i] = sum_in_pairs(sums_.data() + begin, ends_[i] - begin);
    }
    return sum_in_pairs(sums_.data(), static_cast<int64_t>(gradients_.size()));
}

void GradientNorm::sum_block(int64_t block) {
    const int64_t i = std::upper_bound(ends_.begin(), ends_.end(), block) - ends_.begin();
    const Gradient& gradient = gradients_[i];
    const int64_t begin = (block - (i == 0 ? 0 : ends_[i - 1])) * norm_block;
    const int64_t count = std::min(norm_block, gradient.tensor->size - begin);
    alignas(64) double lanes[norm_lanes] = {};
    add_squares_of_gradient(*chosen_isa().kernels, gradient.dtype, *gradient.tensor, begin, count, lanes);
    sums_[block] = sum_in_pairs(lanes, norm_lanes);
}

}  // namespace fusedstep::cpu
