#include "norm.hpp"

#include <algorithm>

#include "../core/norm.hpp"
#include "dispatch.hpp"
#include "float_environment.hpp"
#include "parallel_for.hpp"
#include "tile.hpp"

namespace fusedstep::cpu {
namespace {

bool is_plain(const Tensor& tensor) {
    return tensor.layout == nullptr &&
           (tensor.storage == nullptr || tensor.storage->formats[gradient_stream] == Format::native);
}

}  // namespace

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

const std::vector<double>& GradientNorm::sums_of_blocks() {
    const int64_t blocks = ends_.empty() ? 0 : ends_.back();
    sums_.resize(blocks);
    parallel_for(blocks * norm_block, bytes_, [&](int64_t from, int64_t to) {
        const FloatEnvironment ieee;
        sum_blocks(from / norm_block, to / norm_block);
    });
    return sums_;
}

double GradientNorm::sum_of_squares() {
    sums_of_blocks();
    const FloatEnvironment ieee;
    int64_t begin = 0;
    for (size_t i = 0; i < gradients_.size(); begin = ends_[i++]) {
        sums_[i] = sum_in_pairs(sums_.data() + begin, ends_[i] - begin);
    }
    return sum_in_pairs(sums_.data(), static_cast<int64_t>(gradients_.size()));
}

void GradientNorm::sum_blocks(int64_t begin, int64_t end) {
    const KernelTable& kernels = *chosen_isa().kernels;
    // Intel's processors read memory faster in several streams than in one, AMD's take up to 1.7 times as long so.
    const bool side_by_side = made_by_intel();
    size_t i = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin();
    for (int64_t block = begin, blocks = 0; block < end; block += blocks) {
        while (ends_[i] <= block) ++i;
        const auto& [tensor, dtype] = gradients_[i];
        const int64_t first = (block - (i == 0 ? 0 : ends_[i - 1])) * norm_block;
        alignas(64) double lanes[blocks_side_by_side * norm_lanes] = {};
        if (side_by_side && is_plain(*tensor) && block + blocks_side_by_side <= end &&
            first + blocks_side_by_side * norm_block <= tensor->size) {
            blocks = blocks_side_by_side;
            const char* const values = static_cast<const char*>(tensor->streams[gradient_stream]);
            kernels.norm[static_cast<int>(dtype)].side_by_side(values + first * item_size(dtype), lanes);
        } else {
            blocks = 1;
            add_squares_of_gradient(kernels, dtype, *tensor, first, std::min(norm_block, tensor->size - first), lanes);
        }
        for (int64_t k = 0; k < blocks; ++k) sums_[block + k] = sum_in_pairs(lanes + k * norm_lanes, norm_lanes);
    }
}

}  // namespace fusedstep::cpu
