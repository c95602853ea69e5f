// The table of tensors that one launch works through. It travels as a kernel parameter: nothing is
// allocated or copied for a launch, and a CUDA graph that captures it keeps it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../core/job.hpp"

namespace fusedstep::cuda {

// A pack is what a thread moves of a stream at once; a chunk is what a block takes at a time. Chunks are cut
// at pack boundaries of the parameter's memory, and none holds elements of two tensors.
constexpr int pack_bytes = 16;
constexpr int chunk_packs = 1024;
template <class T>
constexpr int pack_lanes = pack_bytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int64_t chunk_elements = int64_t{chunk_packs} * pack_lanes<T>;

// How the tensors of a launch lie in memory, and what the entry of each has for that. Dense: element i of every stream
// is its i-th ...
struct Dense {
    static constexpr int arrays = 1;  // for each stream
    struct Common {};
    static bool holds(int, const Tensor& tensor) { return tensor.layout == nullptr && tensor.storage == nullptr; }
};

// ... each stream has its own strides: in the table, this far from its end, are the number of dimensions, their
// lengths, and for each stream their strides in bytes ...
struct Strided {
    static constexpr int arrays = 1;
    struct Common {};
    static bool holds(int, const Tensor& tensor) { return tensor.layout != nullptr && tensor.storage == nullptr; }

    uint16_t layout;
};

// What tensors share whose streams are stored otherwise than in the type that the rule computes in.
struct StoredStreams {
    uint64_t random;
    const uint64_t* random_on_gpu;  // null: `random`
    Format formats[max_streams];
    uint8_t items[2 * max_streams];  // bytes of an element of each array: the streams, and then what is beside them
};

// ... stored in any formats, with what is beside the streams following them; then with a layout, or 0 for dense. The
// layout has the strides of what is beside the parameter after those of the streams ...
struct Stored {
    static constexpr int arrays = 2;
    using Common = StoredStreams;
    static bool holds(int rule, const Tensor& tensor);

    uint16_t layout;
};

// ... or dense and in these formats, one for each stream of the rule.
template <Format... formats>
struct StoredAs {
    static constexpr int arrays = 2;
    using Common = StoredStreams;
    static bool holds(int, const Tensor& tensor) {
        constexpr Format wanted[max_streams] = {formats...};
        if (tensor.layout != nullptr || tensor.storage == nullptr) return false;
        return std::equal(wanted, wanted + max_streams, tensor.storage->formats.begin());
    }
};

// The placings of a rule's tensors that are not all native. Those that matter most have kernels of their own.
template <class... All>
struct PlacingList {};

template <class Rule>
struct FastPlacings {
    using List = PlacingList<>;
};
template <>
struct FastPlacings<Adam> {
    using List =
        PlacingList<StoredAs<Format::native, Format::native, Format::signed8, Format::unsigned8>,
                    StoredAs<Format::bfloat16, Format::bfloat16, Format::bfloat16, Format::bfloat16>,
                    StoredAs<Format::bfloat16, Format::bfloat16, Format::native, Format::native>,
                    StoredAs<Format::bfloat16_correction8, Format::bfloat16, Format::signed8, Format::unsigned8>,
                    StoredAs<Format::bfloat16_stochastic, Format::bfloat16, Format::signed8, Format::unsigned8>>;
};

template <class... All>
bool any_holds(PlacingList<All...>, [[maybe_unused]] int rule, [[maybe_unused]] const Tensor& tensor) {
    return (All::holds(rule, tensor) || ...);
}

inline bool Stored::holds(int rule, const Tensor& tensor) {
    if (tensor.storage == nullptr) return false;
    return rule != rule_index<Adam> || !any_holds(FastPlacings<Adam>::List{}, rule, tensor);
}

// What consecutive tensors share: where their memory is, and the scalars of the step.
template <class Rule, class T, class Placing>
struct Shared : Placing::Common {
    using Scalars = typename Rule::template Scalars<T>;

    char* bases[Placing::arrays * Rule::streams];  // as pointers, so that nvcc knows them to be in global memory
    const Scalars* on_gpu;                         // null: `scalars`
    Scalars scalars;
};

// A thousand tensors of Adam or AMSGrad fit in one table because an entry holds neither whole addresses (but
// distances from shared ones) nor a length (but where chunks end).
template <class Rule, class Placing>
struct Entry : Placing {
    using Placed = Placing;

    uint32_t places[Placing::arrays * Rule::streams];  // elements from the base of each
    uint32_t chunks_end;                               // the chunks of the tensors up to and with this one
    uint16_t shared;                                   // this far from the table's end
    uint16_t last;                                     // elements of the last chunk
};

// Entries fill `memory` from its beginning; what they refer to, from its end.
template <int Bytes>
struct StepTable {
    static constexpr int capacity = Bytes - 16;

    const NormOutcome* norm;  // in the GPU's memory, or null
    uint32_t chunks;
    uint16_t count;
    bool zero_grad;
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
static_assert(sizeof(SmallTable) == 4096 && sizeof(LargeTable) == 32760);

FUSEDSTEP_INLINE bool is_blockwise(Format format) { return format == Format::signed8 || format == Format::unsigned8; }
FUSEDSTEP_INLINE bool is_random(Format format) { return is_blockwise(format) || format == Format::bfloat16_stochastic; }

// Whether some stream's elements belong to blocks that are counted from the tensor's first.
FUSEDSTEP_INLINE bool are_in_blocks(const Format* formats, int streams) {
    bool in_blocks = false;
    for (int k = 0; k < streams; ++k) in_blocks = in_blocks || is_random(formats[k]);
    return in_blocks;
}

// The elements from the pack boundary at or below a parameter's first element to it.
FUSEDSTEP_INLINE int lead_of(const void* parameter, int item) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(parameter) % pack_bytes) / item;
}

// A table while it is being filled.
class TableMemory {
public:
    void clear() {
        table_.norm = nullptr;
        table_.chunks = 0;
        table_.count = 0;
        table_.zero_grad = false;
        used_ = 0;
    }

    bool empty() const { return table_.count == 0; }

    // Calls visit(table) with the smallest table that holds this one.
    template <class Visit>
    void visit_with(size_t entry_bytes, Visit visit) const {
        const int front = rounded_up(table_.count * entry_bytes);
        if (front + used_ > SmallTable::capacity) {
            visit(table_);
            return;
        }
        SmallTable small;
        small.norm = table_.norm;
        small.chunks = table_.chunks;
        small.count = table_.count;
        small.zero_grad = table_.zero_grad;
        std::memcpy(small.memory, table_.memory, front);
        std::memcpy(small.memory + SmallTable::capacity - used_, table_.memory + LargeTable::capacity - used_, used_);
        visit(small);
    }

protected:
    static int rounded_up(size_t bytes) { return static_cast<int>((bytes + 7) / 8 * 8); }

    bool has_room(int bytes, size_t entry_bytes, int64_t chunks) const {
        return rounded_up(table_.count * entry_bytes) + used_ + bytes <= LargeTable::capacity &&
               table_.chunks + chunks <= INT32_MAX && table_.count < UINT16_MAX;
    }

    template <class E>
    void add_entry(const E& entry) {
        std::memcpy(table_.memory + table_.count * sizeof(E), &entry, sizeof(E));
        ++table_.count;
    }

    unsigned char* reserve(size_t bytes) {
        used_ += rounded_up(bytes);
        return table_.memory + LargeTable::capacity - used_;
    }

    // Appends the strides of one array; an array without has zeros.
    static int64_t* add_strides(int64_t* to, const std::vector<int64_t>& strides, size_t dimensions) {
        std::memset(to, 0, 8 * dimensions);
        std::memcpy(to, strides.data(), 8 * strides.size());
        return to + dimensions;
    }

    LargeTable table_;
    int used_ = 0;  // of the memory's end
};

template <class Rule, class T, class Placing>
class TableFiller : public TableMemory {
public:
    using E = Entry<Rule, Placing>;
    using S = Shared<Rule, T, Placing>;

    explicit TableFiller(const Job& job) : job_(job) { clear(); }

    void clear() {
        TableMemory::clear();
        table_.norm = job_.norm;
        table_.zero_grad = job_.zero_grad;
        first_ = nullptr;
    }

    // False, and nothing is changed, when the tensor does not fit in any more.
    bool add(const Tensor& tensor) {
        const bool shares = first_ != nullptr && is_like_first(tensor) && find_places(tensor);
        int needed = (shares ? 0 : rounded_up(sizeof(S))) + rounded_up(sizeof(E));
        if constexpr (has_layout) {
            if (tensor.layout != nullptr) needed += layout_bytes(*tensor.layout);
        }
        const bool in_packs =
            tensor.layout == nullptr && (!is_stored || !are_in_blocks(tensor.storage->formats.data(), Rule::streams));
        const int64_t size = tensor.size + (in_packs ? lead_of(tensor.streams[0], item_bytes(tensor, 0)) : 0);
        const int64_t chunks = (size + chunk_elements<T> - 1) / chunk_elements<T>;
        if (!has_room(needed, sizeof(E), chunks)) return false;

        if (!shares) share(tensor);
        E entry{};
        std::memcpy(entry.places, places_, sizeof(places_));
        entry.shared = shared_at_;
        if constexpr (has_layout) {
            if (tensor.layout != nullptr) entry.layout = add_layout(*tensor.layout);
        }
        table_.chunks += static_cast<uint32_t>(chunks);
        entry.chunks_end = table_.chunks;
        entry.last = static_cast<uint16_t>(size - (chunks - 1) * chunk_elements<T>);
        add_entry(entry);
        return true;
    }

private:
    static constexpr int arrays = Placing::arrays * Rule::streams;
    static constexpr bool is_stored = Placing::arrays == 2;
    static constexpr bool has_layout = __is_same(Placing, Strided) || __is_same(Placing, Stored);
    static_assert(chunk_elements<T> <= UINT16_MAX);

    // Bases lie this many elements below the first tensor that they are shared by, so that others may lie on
    // both sides of it.
    static constexpr uint64_t below = uint64_t{1} << 31;

    // The streams, and then what is beside them.
    static void* array(const Tensor& tensor, int k) {
        return k < Rule::streams ? tensor.streams[k] : tensor.storage->extras[k - Rule::streams];
    }

    static int item_bytes(const Tensor& tensor, int k) {
        if (tensor.storage == nullptr) return sizeof(T);
        const FormatLayout layout = layout_of(tensor.storage->formats[k % Rule::streams]);
        if (k < Rule::streams) return layout.item == 0 ? sizeof(T) : layout.item;
        return layout.blockwise ? sizeof(float) : layout.extra;
    }

    static int layout_bytes(const StridedLayout& layout) {
        return rounded_up(8 * (1 + layout.shape.size() * (1 + Rule::streams + is_stored)));
    }

    bool is_like_first(const Tensor& tensor) const {
        if (first_->scalars != tensor.scalars) return false;
        if constexpr (is_stored) {
            const Storage &a = *first_->storage, &b = *tensor.storage;
            return a.formats == b.formats && a.random == b.random && a.random_on_gpu == b.random_on_gpu;
        }
        return true;
    }

    // Whether all arrays of a tensor are near the bases; then where.
    bool find_places(const Tensor& tensor) {
        for (int k = 0; k < arrays; ++k) {
            places_[k] = 0;
            if (array(tensor, k) == nullptr) continue;
            const uint64_t item = item_bytes(tensor, k);
            const uint64_t distance = reinterpret_cast<uintptr_t>(array(tensor, k)) - bases_[k];
            if (distance % item != 0 || distance / item > UINT32_MAX) return false;
            places_[k] = static_cast<uint32_t>(distance / item);
        }
        return true;
    }

    void share(const Tensor& tensor) {
        S shared{};
        for (int k = 0; k < arrays; ++k) {
            const bool is_there = array(tensor, k) != nullptr;
            places_[k] = is_there ? static_cast<uint32_t>(below) : 0;
            bases_[k] =
                is_there ? reinterpret_cast<uintptr_t>(array(tensor, k)) - below * item_bytes(tensor, k) : uintptr_t{0};
            shared.bases[k] = reinterpret_cast<char*>(bases_[k]);
        }
        if (job_.scalars_on_gpu)
            shared.on_gpu = static_cast<const typename S::Scalars*>(tensor.scalars);
        else
            std::memcpy(&shared.scalars, tensor.scalars, sizeof(shared.scalars));
        if constexpr (is_stored) {
            shared.random = tensor.storage->random;
            shared.random_on_gpu = tensor.storage->random_on_gpu;
            for (int k = 0; k < Rule::streams; ++k) shared.formats[k] = tensor.storage->formats[k];
            for (int k = 0; k < arrays; ++k) shared.items[k] = static_cast<uint8_t>(item_bytes(tensor, k));
        }
        std::memcpy(reserve(sizeof(S)), &shared, sizeof(S));
        shared_at_ = static_cast<uint16_t>(used_);
        first_ = &tensor;
    }

    uint16_t add_layout(const StridedLayout& layout) {
        const size_t dimensions = layout.shape.size();
        int64_t* to = reinterpret_cast<int64_t*>(reserve(layout_bytes(layout)));
        *to++ = static_cast<int64_t>(dimensions);
        to = add_strides(to, layout.shape, dimensions);
        for (int k = 0; k < Rule::streams; ++k) to = add_strides(to, layout.strides[k], dimensions);
        if constexpr (is_stored) add_strides(to, layout.extra_strides[0], dimensions);
        return static_cast<uint16_t>(used_);
    }

    const Job& job_;
    const Tensor* first_;  // of those that share the bases
    uint16_t shared_at_;
    uint64_t bases_[arrays];
    uint32_t places_[arrays];  // of the tensor being added
};

// Calls visit(table) with tables that hold, in all, the job's tensors of one placing.
template <class Rule, class T, class Placing, class Visit>
void for_each_table(const Job& job, Visit visit) {
    TableFiller<Rule, T, Placing> filler(job);
    const auto flush = [&] {
        if (filler.empty()) return;
        filler.visit_with(sizeof(Entry<Rule, Placing>), visit);
        filler.clear();
    };
    for (int64_t i = 0; i < job.count; ++i) {
        const Tensor& tensor = job.tensors[i];
        if (tensor.size == 0 || !Placing::holds(job.rule, tensor)) continue;
        if (filler.add(tensor)) continue;
        flush();
        filler.add(tensor);
    }
    flush();
}

// Calls visit(a value of each placing that a rule's tensors may have).
template <class Visit, class... Fast>
void for_each_stored_placing(PlacingList<Fast...>, Visit visit) {
    (visit(Fast{}), ...);
    visit(Stored{});
}

}  // namespace fusedstep::cuda
