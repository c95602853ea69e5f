#include "tile.hpp"

#include <algorithm>
#include <cstring>

#include "dispatch.hpp"

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

// Copies items to or from a strided array. The size is a constant in each copy.
template <bool gather, class Word>
void move_words(Walker& walker, char* strided, char* dense, int64_t count) {
    walker.advance(count, [&](int64_t offset, int64_t stretch) {
        for (int64_t i = 0; i < stretch; ++i, dense += sizeof(Word)) {
            char* const item = strided + offset + i * walker.last_stride();
            std::memcpy(gather ? dense : item, gather ? item : dense, sizeof(Word));
        }
    });
}

template <bool gather>
void move_items(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, int64_t begin, void* strided,
                void* dense, int item, int64_t count) {
    Walker walker(shape, strides, begin);
    auto* const from = static_cast<char*>(strided);
    auto* const to = static_cast<char*>(dense);
    switch (item) {
        case 1:
            return move_words<gather, uint8_t>(walker, from, to, count);
        case 2:
            return move_words<gather, uint16_t>(walker, from, to, count);
        case 4:
            return move_words<gather, uint32_t>(walker, from, to, count);
        default:
            return move_words<gather, uint64_t>(walker, from, to, count);
    }
}

// One stream's part of a tile. The size is no multiple of 4096, by which a processor takes loads and stores in
// different buffers for the same.
struct alignas(64) Buffer {
    char values[tile_elements * 8];  // what the kernel sees
    char items[tile_elements * 4];   // of a strided array, as stored
    char extras[tile_elements * 4];
    char apart[3 * 64];
};

class TiledStream {
public:
    TiledStream(DType dtype, const Tensor& tensor, int k)
        : format_(tensor.storage == nullptr ? Format::native : tensor.storage->formats[k]),
          item_(layout_of(format_).item == 0 ? item_size(dtype) : layout_of(format_).item),
          extra_(layout_of(format_).extra),
          layout_(layout_of(format_).blockwise ? nullptr : tensor.layout),
          stream_{tensor.streams[k], tensor.storage == nullptr ? nullptr : tensor.storage->extras[k]},
          random_(tensor.storage == nullptr ? 0 : tensor.storage->random),
          k_(k) {}

    // Returns where the kernel finds the values of elements [begin, begin + n).
    void* load(const KernelTable& kernels, int64_t begin, int64_t n, Buffer& buffer) const {
        if (format_ == Format::native) {
            if (layout_ == nullptr) return static_cast<char*>(stream_.items) + begin * item_;
            move_items<true>(layout_->shape, layout_->strides[k_], begin, stream_.items, buffer.values, item_, n);
            return buffer.values;
        }
        auto* const values = reinterpret_cast<float*>(buffer.values);
        const Codec& codec = kernels.codec[static_cast<int>(format_)];
        if (layout_ == nullptr) {
            codec.decode(stream_, begin, n, values);
            return values;
        }
        move_items<true>(layout_->shape, layout_->strides[k_], begin, stream_.items, buffer.items, item_, n);
        if (extra_ != 0)
            move_items<true>(layout_->shape, layout_->extra_strides[k_], begin, stream_.extras, buffer.extras, extra_,
                             n);
        codec.decode({buffer.items, buffer.extras}, 0, n, values);
        return values;
    }

    void store(const KernelTable& kernels, int64_t begin, int64_t n, Buffer& buffer) const {
        if (format_ == Format::native) {
            if (layout_ != nullptr)
                move_items<false>(layout_->shape, layout_->strides[k_], begin, stream_.items, buffer.values, item_, n);
            return;
        }
        auto* const values = reinterpret_cast<float*>(buffer.values);
        const Codec& codec = kernels.codec[static_cast<int>(format_)];
        if (layout_ == nullptr) {
            codec.encode(stream_, begin, n, begin / block_elements, random_, values);
            return;
        }
        codec.encode({buffer.items, buffer.extras}, 0, n, begin / block_elements, random_, values);
        move_items<false>(layout_->shape, layout_->strides[k_], begin, stream_.items, buffer.items, item_, n);
        if (extra_ != 0)
            move_items<false>(layout_->shape, layout_->extra_strides[k_], begin, stream_.extras, buffer.extras, extra_,
                              n);
    }

    // A gradient's format stores 0 as zero bits, and keeps nothing beside the items.
    void zero(int64_t begin, int64_t n) const {
        if (layout_ == nullptr) {
            std::memset(static_cast<char*>(stream_.items) + begin * item_, 0, n * item_);
            return;
        }
        alignas(64) char zeros[tile_elements * 8] = {};
        for (const int64_t end = begin + n; begin < end; begin += tile_elements) {
            move_items<false>(layout_->shape, layout_->strides[k_], begin, stream_.items, zeros, item_,
                              std::min(tile_elements, end - begin));
        }
    }

private:
    const Format format_;
    const int item_, extra_;
    const StridedLayout* const layout_;
    const Stream stream_;
    const uint64_t random_;
    const int k_;
};

const FusedStep* find_fused(const KernelTable& kernels, const Job& job, const Tensor& tensor) {
    if (tensor.layout != nullptr || tensor.storage == nullptr) return nullptr;
    for (int i = 0; i < kernels.fused_count; ++i) {
        const FusedStep& fused = kernels.fused[i];
        if (fused.rule == job.rule &&
            std::equal(fused.formats, fused.formats + max_streams, tensor.storage->formats.begin())) {
            return &fused;
        }
    }
    return nullptr;
}

}  // namespace

void tiled_step(const KernelTable& kernels, const Job& job, const Tensor& tensor, int64_t begin, int64_t count) {
    const RuleStreams rule = rule_streams[job.rule];
    static_assert(max_streams == 5);
    if (const FusedStep* const fused = find_fused(kernels, job, tensor); fused != nullptr) {
        Stream memory[max_streams];
        for (int k = 0; k < rule.count; ++k) memory[k] = {tensor.streams[k], tensor.storage->extras[k]};
        const int64_t whole = count / block_elements * block_elements;
        fused->run(memory, begin, whole, tensor.scalars, tensor.storage->random);
        begin += whole;
        count -= whole;
    }
    const StepKernel kernel = kernels.step[made_by_intel()][job.rule][static_cast<int>(job.dtype)];
    const TiledStream streams[max_streams] = {{job.dtype, tensor, 0},
                                              {job.dtype, tensor, 1},
                                              {job.dtype, tensor, 2},
                                              {job.dtype, tensor, 3},
                                              {job.dtype, tensor, 4}};
    Buffer buffers[max_streams];
    void* values[max_streams];
    for (const int64_t end = begin + count; begin < end; begin += tile_elements) {
        const int64_t n = std::min(tile_elements, end - begin);
        for (int k = 0; k < rule.count; ++k) values[k] = streams[k].load(kernels, begin, n, buffers[k]);
        kernel(values, 0, n, tensor.scalars);
        for (int k = 0; k < rule.count; ++k) {
            if (rule.written >> k & 1) streams[k].store(kernels, begin, n, buffers[k]);
        }
    }
}

void add_squares_of_gradient(const KernelTable& kernels, DType dtype, const Tensor& tensor, int64_t begin,
                             int64_t count, double* lanes) {
    const TiledStream gradient(dtype, tensor, gradient_stream);
    Buffer buffer;
    for (const int64_t end = begin + count; begin < end; begin += tile_elements) {
        const int64_t n = std::min(tile_elements, end - begin);
        kernels.norm[static_cast<int>(dtype)].part(gradient.load(kernels, begin, n, buffer), n, lanes);
    }
}

void zero_gradient(DType dtype, const Tensor& tensor, int64_t begin, int64_t count) {
    TiledStream(dtype, tensor, gradient_stream).zero(begin, count);
}

}  // namespace fusedstep::cpu
