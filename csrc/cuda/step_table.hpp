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
struct Dense {
    // Elements from the pack boundary at or below the first element to it; `no_packs` where the streams lie
    // differently against their boundaries.
    uint16_t lead;

    static constexpr uint16_t no_packs = UINT16_MAX;
};

// ... or each with its own strides: in the table, this far from its end, are the number of dimensions, their
// lengths, and for each stream their strides in bytes.
struct Strided {
    uint16_t layout;
};

template <class Rule, class Placing>
struct Entry {
    void* streams[Rule::streams];
    int64_t size;
    uint32_t chunks_end;  // the chunks of the tensors up to and with this one
    uint16_t scalars;     // this far from the table's end
    Placing placing;
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

// Kernel parameters may take 4 KiB everywhere and 32,764 bytes since CUDA 12.1. The small table costs less
// to launch, and holds any one tensor: NumPy and DLPack stop at 64 dimensions.
using SmallTable = StepTable<4096 - 8>;
using LargeTable = StepTable<32760>;

template <class Rule, class T, class Placing>
class TableFiller {
public:
    using E = Entry<Rule, Placing>;
    using Scalars = typename Rule::template Scalars<T>;

    TableFiller() { clear(); }

    void clear() {
        table_.count = table_.chunks = 0;
        used_ = 0;
        scalars_ = nullptr;
    }

    bool empty() const { return table_.count == 0; }

    // False, and nothing is changed, when the tensor does not fit in any more.
    bool add(const Tensor& tensor) {
        const bool new_scalars = tensor.scalars != scalars_;
        int needed = (new_scalars ? rounded_up(sizeof(Scalars)) : 0) + static_cast<int>(sizeof(E));
        if constexpr (is_strided) needed += layout_bytes(*tensor.layout);
        E entry{};
        for (int k = 0; k < Rule::streams; ++k) entry.streams[k] = tensor.streams[k];
        entry.size = tensor.size;
        int64_t before_first = 0;
        if constexpr (!is_strided) {
            entry.placing.lead = common_lead(tensor);
            if (entry.placing.lead != Dense::no_packs) before_first = entry.placing.lead;
        }
        const int64_t chunks = (before_first + tensor.size + chunk_elements<T> - 1) / chunk_elements<T>;
        if (front() + used_ + needed > LargeTable::capacity || table_.chunks + chunks > INT32_MAX) return false;

        if (new_scalars) {
            std::memcpy(reserve(sizeof(Scalars)), tensor.scalars, sizeof(Scalars));
            scalars_ = tensor.scalars;
            scalars_at_ = static_cast<uint16_t>(used_);
        }
        entry.scalars = scalars_at_;
        if constexpr (is_strided) entry.placing.layout = add_layout(*tensor.layout);
        table_.chunks += static_cast<uint32_t>(chunks);
        entry.chunks_end = table_.chunks;
        std::memcpy(table_.memory + front(), &entry, sizeof(E));
        ++table_.count;
        return true;
    }

    bool fits_small() const { return front() + used_ <= SmallTable::capacity; }

    const LargeTable& large() const { return table_; }

    void copy_to(SmallTable& small) const {
        small.count = table_.count;
        small.chunks = table_.chunks;
        std::memcpy(small.memory, table_.memory, front());
        std::memcpy(small.memory + SmallTable::capacity - used_, table_.memory + LargeTable::capacity - used_, used_);
    }

private:
    static constexpr bool is_strided = __is_same(Placing, Strided);

    static int rounded_up(size_t bytes) { return static_cast<int>((bytes + 7) / 8 * 8); }

    static int layout_bytes(const StridedLayout& layout) {
        return rounded_up(8 * (1 + layout.shape.size() * (1 + Rule::streams)));
    }

    static uint16_t common_lead(const Tensor& tensor) {
        const uintptr_t lead = reinterpret_cast<uintptr_t>(tensor.streams[0]) % pack_bytes;
        for (int k = 1; k < Rule::streams; ++k) {
            if (reinterpret_cast<uintptr_t>(tensor.streams[k]) % pack_bytes != lead) return Dense::no_packs;
        }
        return static_cast<uint16_t>(lead / sizeof(T));
    }

    int front() const { return static_cast<int>(table_.count * sizeof(E)); }

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

    LargeTable table_;
    int used_;  // of the memory's end
    const void* scalars_;
    uint16_t scalars_at_;
};

// Calls visit(table) with tables that hold, in all, the job's tensors of one placing.
template <class Rule, class T, class Placing, class Visit>
void for_each_table(const Job& job, Visit visit) {
    TableFiller<Rule, T, Placing> filler;
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
