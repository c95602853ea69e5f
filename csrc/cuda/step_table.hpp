// The table of tensors that one launch works through. It travels as a kernel parameter: nothing is
// allocated or copied for a launch, and a CUDA graph that captures it keeps it.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/job.hpp"

namespace fusedstep::cuda {

// A pack is what a thread reads of a stream at once; a chunk is what a block takes at a time. Chunks are cut
// at pack boundaries of memory, and none holds elements of two tensors.
constexpr int pack_bytes = 16;
constexpr int chunk_packs = 1024;
template <class T>
constexpr int pack_lanes = pack_bytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int64_t chunk_elements = int64_t{chunk_packs} * pack_lanes<T>;

// How a tensor lies in memory: its streams dense ...
struct Dense {};

// ... or each with its own strides: in the table, this far from its end, are the number of dimensions, their
// lengths, and for each stream their strides in bytes.
struct Strided {
    uint16_t layout;
};

// What consecutive tensors share: where their memory is, and the scalars of the step.
template <class Rule, class T>
struct Shared {
    using Scalars = typename Rule::template Scalars<T>;

    char* bases[Rule::streams];  // as pointers, so that nvcc knows them to be in global memory
    const Scalars* on_gpu;       // null: `scalars`
    Scalars scalars;
};

// A thousand tensors of Adam or AMSGrad fit in one table because an entry holds neither whole addresses (but
// distances from shared ones) nor a length (but where chunks end).
template <class Rule, class Placing>
struct Entry : Placing {
    uint32_t streams[Rule::streams];  // elements from the base of each
    uint32_t chunks_end;              // the chunks of the tensors up to and with this one
    uint16_t shared;                  // this far from the table's end
    uint16_t last;                    // elements of the last chunk
};

// Entries fill `memory` from its beginning; what they refer to, from its end.
template <int Bytes>
struct StepTable {
    static constexpr int capacity = Bytes - 8;

    uint32_t count;
    uint32_t chunks;
    alignas(8) unsigned char memory[capacity];

    template <class E>
    FUSEDSTEP_INLINE const E* entries() const {
        return reinterpret_cast<const E*>(memory);
    }
    template <class Value>
    FUSEDSTEP_INLINE const Value* from_end(int distance) const {
        return reinterpret_cast<const Value*>(memory + capacity - distance);
    }
};

// Kernel parameters may take 32,764 bytes since CUDA 12.1. A launch copies its whole parameter, so there is a
// table that is cheaper to launch; it holds any one tensor (NumPy and DLPack stop at 64 dimensions).
using SmallTable = StepTable<4096>;
using LargeTable = StepTable<32760>;

// The elements of the first stream from the pack boundary at or below its first element to it, or -1 where the
// streams lie differently against their boundaries.
template <class T>
FUSEDSTEP_INLINE int common_lead(void* const* streams, int count) {
    const auto past = [&](int k) { return static_cast<int>(reinterpret_cast<uintptr_t>(streams[k]) % pack_bytes); };
    for (int k = 1; k < count; ++k) {
        if (past(k) != past(0)) return -1;
    }
    return past(0) / static_cast<int>(sizeof(T));
}

template <class Rule, class T, class Placing>
class TableFiller {
public:
    using E = Entry<Rule, Placing>;
    using S = Shared<Rule, T>;

    explicit TableFiller(bool scalars_on_gpu) : scalars_on_gpu_(scalars_on_gpu) { clear(); }

    void clear() {
        table_.count = table_.chunks = 0;
        used_ = 0;
        scalars_ = nullptr;
    }

    bool empty() const { return table_.count == 0; }

    // False, and nothing is changed, when the tensor does not fit in any more.
    bool add(const Tensor& tensor) {
        const bool shares = scalars_ == tensor.scalars && find_streams(tensor);
        int needed = (shares ? 0 : rounded_up(sizeof(S))) + rounded_up(sizeof(E));
        int lead = 0;
        if constexpr (is_strided)
            needed += layout_bytes(*tensor.layout);
        else
            lead = common_lead<T>(tensor.streams.data(), Rule::streams);
        const int64_t before_first = lead < 0 ? 0 : lead;
        const int64_t chunks = (before_first + tensor.size + chunk_elements<T> - 1) / chunk_elements<T>;
        if (used() + needed > LargeTable::capacity || table_.chunks + chunks > INT32_MAX) return false;

        if (!shares) share(tensor);
        E entry{};
        std::memcpy(entry.streams, streams_, sizeof(streams_));
        entry.shared = shared_at_;
        if constexpr (is_strided) entry.layout = add_layout(*tensor.layout);
        table_.chunks += static_cast<uint32_t>(chunks);
        entry.chunks_end = table_.chunks;
        entry.last = static_cast<uint16_t>(before_first + tensor.size - (chunks - 1) * chunk_elements<T>);
        std::memcpy(table_.memory + table_.count * sizeof(E), &entry, sizeof(E));
        ++table_.count;
        return true;
    }

    const LargeTable& large() const { return table_; }

    bool fits_small() const { return used() <= SmallTable::capacity; }

    void copy_to(SmallTable& small) const {
        small.count = table_.count;
        small.chunks = table_.chunks;
        std::memcpy(small.memory, table_.memory, front());
        std::memcpy(small.memory + SmallTable::capacity - used_, table_.memory + LargeTable::capacity - used_, used_);
    }

private:
    static constexpr bool is_strided = __is_same(Placing, Strided);
    static_assert(chunk_elements<T> <= UINT16_MAX);

    // Bases lie this many elements below the first tensor that they are shared by, so that others may lie on
    // both sides of it.
    static constexpr uint64_t below = uint64_t{1} << 31;

    static int rounded_up(size_t bytes) { return static_cast<int>((bytes + 7) / 8 * 8); }

    static int layout_bytes(const StridedLayout& layout) {
        return rounded_up(8 * (1 + layout.shape.size() * (1 + Rule::streams)));
    }

    // Whether all streams of a tensor are near the bases; then where.
    bool find_streams(const Tensor& tensor) {
        for (int k = 0; k < Rule::streams; ++k) {
            const uint64_t distance = reinterpret_cast<uintptr_t>(tensor.streams[k]) - bases_[k];
            if (distance % sizeof(T) != 0 || distance / sizeof(T) > UINT32_MAX) return false;
            streams_[k] = static_cast<uint32_t>(distance / sizeof(T));
        }
        return true;
    }

    void share(const Tensor& tensor) {
        S shared{};
        for (int k = 0; k < Rule::streams; ++k) {
            bases_[k] = reinterpret_cast<uintptr_t>(tensor.streams[k]) - below * sizeof(T);
            streams_[k] = static_cast<uint32_t>(below);
        }
        for (int k = 0; k < Rule::streams; ++k) shared.bases[k] = reinterpret_cast<char*>(bases_[k]);
        if (scalars_on_gpu_)
            shared.on_gpu = static_cast<const typename S::Scalars*>(tensor.scalars);
        else
            std::memcpy(&shared.scalars, tensor.scalars, sizeof(shared.scalars));
        std::memcpy(reserve(sizeof(S)), &shared, sizeof(S));
        shared_at_ = static_cast<uint16_t>(used_);
        scalars_ = tensor.scalars;
    }

    int used() const { return front() + used_; }

    int front() const { return rounded_up(table_.count * sizeof(E)); }

    unsigned char* reserve(size_t bytes) {
        used_ += rounded_up(bytes);
        return table_.memory + LargeTable::capacity - used_;
    }

    uint16_t add_layout(const StridedLayout& layout) {
        const size_t dimensions = layout.shape.size();
        int64_t* to = reinterpret_cast<int64_t*>(reserve(layout_bytes(layout)));
        *to++ = static_cast<int64_t>(dimensions);
        std::memcpy(to, layout.shape.data(), 8 * dimensions);
        for (int k = 0; k < Rule::streams; ++k) {
            to += dimensions;
            std::memcpy(to, layout.strides[k].data(), 8 * dimensions);
        }
        return static_cast<uint16_t>(used_);
    }

    const bool scalars_on_gpu_;
    LargeTable table_;
    int used_;  // of the memory's end
    const void* scalars_;
    uint16_t shared_at_;
    uint64_t bases_[Rule::streams];
    uint32_t streams_[Rule::streams];  // of the tensor being added
};

// Calls visit(table) with tables that hold, in all, the job's tensors of one placing.
template <class Rule, class T, class Placing, class Visit>
void for_each_table(const Job& job, Visit visit) {
    TableFiller<Rule, T, Placing> filler(job.scalars_on_gpu);
    const auto flush = [&] {
        if (filler.empty()) return;
        if (filler.fits_small()) {
            SmallTable small;
            filler.copy_to(small);
            visit(small);
        } else {
            visit(filler.large());
        }
        filler.clear();
    };
    for (int64_t i = 0; i < job.count; ++i) {
        const Tensor& tensor = job.tensors[i];
        if (tensor.size == 0 || (tensor.layout != nullptr) != __is_same(Placing, Strided)) continue;
        if (filler.add(tensor)) continue;
        flush();
        filler.add(tensor);
    }
    flush();
}

}  // namespace fusedstep::cuda
