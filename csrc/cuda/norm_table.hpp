// The table of gradients that one launch of the norm's kernels works through: a step's table, with entries of its own.
#pragma once

#include "../core/norm_job.hpp"
#include "step_table.hpp"

namespace fusedstep::cuda {

// A chunk is what the threads of a warp take at a time: as many blocks of the norm as have a pack of a row of lanes for
// each of them.
constexpr int blocks_of_chunk_of(DType dtype) { return pack_bytes / item_size(dtype); }

// As a constant, which device code may use where it may not call the function.
template <DType dtype>
constexpr int blocks_of_chunk = blocks_of_chunk_of(dtype);

// What consecutive gradients share. Where they are strided, the lengths and then the strides in bytes follow.
struct GradientKind {
    DType dtype;         // of the elements in memory
    int64_t dimensions;  // 0: dense
};

struct NormEntry {
    const char* gradient;
    uint32_t chunks_end;  // the chunks of the gradients up to and with this one ...
    uint32_t blocks_end;  // ... and the blocks of the norm
    uint16_t kind;        // this far from the table's end
    uint16_t last;        // elements of the last block
};

FUSEDSTEP_INLINE uint32_t blocks_before(const NormEntry* entries, uint32_t i) {
    return i == 0 ? 0 : entries[i - 1].blocks_end;
}

// At the table's very end: where the sums of its blocks and its gradients are, and as much memory to add the former in.
struct NormSums {
    double* blocks;
    double* spare;
    double* gradients;
};

class NormTableFiller : public TableMemory {
public:
    explicit NormTableFiller(const NormSums& sums) : sums_(sums) { start(); }

    // A new table, for the gradients after those of this one.
    void start_next() {
        sums_.blocks += blocks_;
        sums_.spare += blocks_;
        sums_.gradients += table_.count;
        start();
    }

    // False, and nothing is changed, when the gradient does not fit in any more.
    bool add(const NormJob::Gradient& gradient) {
        const Tensor& tensor = *gradient.tensor;
        const size_t dimensions = tensor.layout == nullptr ? 0 : tensor.layout->shape.size();
        const DType dtype = stored_type(gradient);
        const bool shares = kind_at_ != 0 && dimensions == 0 && dense_ && dtype == dtype_;
        const size_t kind_bytes = shares ? 0 : sizeof(GradientKind) + 16 * dimensions;
        const int64_t blocks = norm_blocks(tensor.size);
        const int64_t chunks = (blocks - 1) / blocks_of_chunk_of(dtype) + 1;
        if (!has_room(rounded_up(kind_bytes) + rounded_up(sizeof(NormEntry)), sizeof(NormEntry), chunks) ||
            blocks_ + blocks > INT32_MAX)
            return false;
        if (!shares) {
            const GradientKind kind{dtype, static_cast<int64_t>(dimensions)};
            unsigned char* const to = reserve(kind_bytes);
            std::memcpy(to, &kind, sizeof(kind));
            if (dimensions > 0) {
                int64_t* const lengths = reinterpret_cast<int64_t*>(to + sizeof(kind));
                add_strides(add_strides(lengths, tensor.layout->shape, dimensions),
                            tensor.layout->strides[gradient_stream], dimensions);
            }
            kind_at_ = static_cast<uint16_t>(used_);
            dense_ = dimensions == 0;
            dtype_ = dtype;
        }
        table_.chunks += static_cast<uint32_t>(chunks);
        blocks_ += blocks;
        add_entry(NormEntry{static_cast<const char*>(tensor.streams[gradient_stream]), table_.chunks,
                            static_cast<uint32_t>(blocks_), kind_at_,
                            static_cast<uint16_t>(tensor.size - (blocks - 1) * norm_block)});
        return true;
    }

private:
    static DType stored_type(const NormJob::Gradient& gradient) {
        const Storage* const storage = gradient.tensor->storage;
        if (storage == nullptr || storage->formats[gradient_stream] == Format::native) return gradient.dtype;
        return storage->formats[gradient_stream] == Format::bfloat16 ? DType::bfloat16 : DType::float16;
    }

    void start() {
        clear();
        std::memcpy(reserve(sizeof(NormSums)), &sums_, sizeof(sums_));
        kind_at_ = 0;
        blocks_ = 0;
    }

    NormSums sums_;
    int64_t blocks_;
    uint16_t kind_at_;
    bool dense_;
    DType dtype_;
};

// Calls visit(table) for tables that hold all gradients of a job but the empty ones, and returns how many those are.
template <class Visit>
int64_t for_each_norm_table(const NormJob& job, Visit visit) {
    int64_t blocks = 0, gradients = 0;
    for (int64_t i = 0; i < job.count; ++i) {
        blocks += norm_blocks(job.gradients[i].tensor->size);
        gradients += job.gradients[i].tensor->size > 0;
    }
    double* const block_sums = job.workspace + 2 * gradients;
    NormTableFiller filler({block_sums, block_sums + blocks, job.workspace});
    for (int64_t i = 0; i < job.count; ++i) {
        if (job.gradients[i].tensor->size == 0 || filler.add(job.gradients[i])) continue;
        filler.visit_with(sizeof(NormEntry), visit);
        filler.start_next();
        filler.add(job.gradients[i]);
    }
    if (!filler.empty()) filler.visit_with(sizeof(NormEntry), visit);
    return gradients;
}

}  // namespace fusedstep::cuda
