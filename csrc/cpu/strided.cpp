#include "strided.hpp"

#include <algorithm>
#include <cstring>

namespace fusedstep::cpu {
namespace {

constexpr int64_t tile_elements = 256;

// NumPy's own limit is 64 dimensions.
constexpr int max_dimensions = 64;

// Walks the elements of a strided array in order.
class Walker {
public:
    Walker(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, int64_t element)
        : shape_(shape), strides_(strides) {
        for (int d = static_cast<int>(shape.size()) - 1; d >= 0; --d) {
            index_[d] = element % shape[d];
            element /= shape[d];
            offset_ += index_[d] * strides[d];
        }
    }

    // Calls visit(byte offset, count) for stretches along the last dimension, `count` elements in all.
    template <class Visit>
    void advance(int64_t count, Visit visit) {
        const int last = static_cast<int>(shape_.size()) - 1;
        while (count > 0) {
            const int64_t stretch = std::min(count, shape_[last] - index_[last]);
            visit(offset_, stretch);
            count -= stretch;
            index_[last] += stretch;
            offset_ += stretch * strides_[last];
            for (int d = last; d > 0 && index_[d] == shape_[d]; --d) {
                offset_ += strides_[d - 1] - shape_[d] * strides_[d];
                index_[d] = 0;
                ++index_[d - 1];
            }
        }
    }

    int64_t last_stride() const { return strides_.back(); }

private:
    const std::vector<int64_t>& shape_;
    const std::vector<int64_t>& strides_;
    int64_t index_[max_dimensions];
    int64_t offset_ = 0;
};

template <class Word>
void gather(Walker& walker, const char* from, Word* to, int64_t count) {
    walker.advance(count, [&](int64_t offset, int64_t stretch) {
        for (int64_t i = 0; i < stretch; ++i) std::memcpy(to++, from + offset + i * walker.last_stride(), sizeof(Word));
    });
}

template <class Word>
void scatter(Walker& walker, const Word* from, char* to, int64_t count) {
    walker.advance(count, [&](int64_t offset, int64_t stretch) {
        for (int64_t i = 0; i < stretch; ++i) std::memcpy(to + offset + i * walker.last_stride(), from++, sizeof(Word));
    });
}

template <class Word>
void step(StepKernel kernel, unsigned written, int streams, const Tensor& tensor, int64_t begin, int64_t count) {
    alignas(64) Word tiles[max_streams][tile_elements];
    void* tile_streams[max_streams];
    for (int k = 0; k < streams; ++k) tile_streams[k] = tiles[k];
    for (const int64_t end = begin + count; begin < end; begin += tile_elements) {
        const int64_t n = std::min(tile_elements, end - begin);
        for (int k = 0; k < streams; ++k) {
            Walker walker(tensor.layout->shape, tensor.layout->strides[k], begin);
            gather(walker, static_cast<const char*>(tensor.streams[k]), tiles[k], n);
        }
        kernel(tile_streams, 0, n, tensor.scalars);
        for (int k = 0; k < streams; ++k) {
            if ((written >> k & 1) == 0) continue;
            Walker walker(tensor.layout->shape, tensor.layout->strides[k], begin);
            scatter(walker, tiles[k], static_cast<char*>(tensor.streams[k]), n);
        }
    }
}

}  // namespace

void strided_step(StepKernel kernel, const Job& job, const Tensor& tensor, int64_t begin, int64_t count) {
    const RuleStreams rule = rule_streams[job.rule];
    if (item_size(job.dtype) == 4)
        step<uint32_t>(kernel, rule.written, rule.count, tensor, begin, count);
    else
        step<uint64_t>(kernel, rule.written, rule.count, tensor, begin, count);
}

}  // namespace fusedstep::cpu
