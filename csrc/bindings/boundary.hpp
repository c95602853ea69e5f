// Every check of the arrays of a step, all of it before the first write.
#pragma once

#include <deque>
#include <vector>

#include "../core/job.hpp"
#include "array_view.hpp"

namespace fusedstep {

// The name of each stream of a rule at the API, in the rule's order.
const char* const* stream_roles(int rule);

// Where a stream lies in memory. `dense` is false when there are gaps between its elements.
struct Extent {
    const char* begin;
    const char* end;
    bool dense;
    bool written;
    py::handle object;
    ArrayName name;
};

// What tensors point to, at stable addresses; reused from call to call.
template <class T>
class Store {
public:
    // The next place, if `fill` says that what it put there is needed.
    template <class Fill>
    const T* fill(const Fill& fill) {
        if (used_ == kept_.size()) kept_.emplace_back();
        return fill(kept_[used_]) ? &kept_[used_++] : nullptr;
    }
    T& last() { return kept_[used_ - 1]; }
    void clear() { used_ = 0; }

private:
    std::deque<T> kept_;
    size_t used_ = 0;
};

struct StepStores {
    Store<StridedLayout> layouts;
    Store<Storage> storages;

    void clear() {
        layouts.clear();
        storages.clear();
    }
    // Of the storage filled last.
    void set_random(uint64_t random, const uint64_t* on_gpu) {
        storages.last().random = random;
        storages.last().random_on_gpu = on_gpu;
    }
};

// The arrays of one parameter: stream k of its rule, and what lies beside it where the format has that.
struct ParameterViews {
    ArrayView streams[max_streams];
    ArrayView extras[max_streams];
    bool has_extra[max_streams] = {};
    bool stochastic = false;  // how a bfloat16 parameter with nothing beside it is rounded

    const ArrayView* extra(int k) const { return has_extra[k] ? &extras[k] : nullptr; }
};

// The name of what lies beside each stream.
const char* const* extra_roles(int rule);

// Whether a stream has the parameter's shape; 8-bit moments have not.
bool is_walked(const ArrayView& view, int k);

// Checks the arrays of one parameter and describes them to the kernels. `name.role` is ignored. The scalars are
// left null.
Tensor bind(int rule, const ParameterViews& views, const ArrayName& name, StepStores& stores);

// A gradient whose parameter and state are known to be good.
void check_gradient(const ArrayView& gradient, const ArrayView& parameter, const ArrayName& name);

// A gradient that the call sets to zero.
void check_zeroed(const ArrayView& gradient, const ArrayName& name);

Extent extent_of(const ArrayView& view, bool written, const ArrayName& name);

// Throws when a written array shares memory with another array. Sorts the extents by address.
void check_overlaps(std::vector<Extent>& extents);

[[noreturn]] void throw_overlap(const Extent& a, const Extent& b);

// Whether two extents that meet share an element: exact for arrays with gaps too.
bool share_memory(const Extent& a, const Extent& b);

}  // namespace fusedstep
