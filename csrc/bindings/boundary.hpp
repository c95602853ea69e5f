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

// The layouts of tensors that are not dense, at stable addresses; reused from call to call.
class LayoutStore {
public:
    StridedLayout* take();
    void give_back() { --used_; }
    void clear() { used_ = 0; }

private:
    std::deque<StridedLayout> layouts_;
    size_t used_ = 0;
};

// Checks the arrays of one parameter (views[k] is stream k of the rule) and describes them to the kernels.
// `name.role` is ignored. The scalars are left null.
Tensor bind(int rule, const ArrayView* views, const ArrayName& name, LayoutStore& layouts);

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
