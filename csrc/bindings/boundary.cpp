#include "boundary.hpp"

#include <algorithm>
#include <cstdlib>

#include "gpu_arrays.hpp"

namespace fusedstep {
namespace {

constexpr const char* gd_roles[] = {"params", "grads", "momentum_buffer"};
constexpr const char* adam_roles[] = {"params", "grads", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

ArrayName with_role(ArrayName name, const char* role) {
    name.role = role;
    return name;
}

void check_like_parameter(const ArrayView& view, const ArrayView& parameter, bool is_gradient, const ArrayName& name) {
    if (!view.known_dtype || view.dtype != parameter.dtype) {
        const std::string what = name.text(), wanted = fusedstep::name(parameter.dtype);
        throw py::type_error(what + ": " + view.dtype_text() + ", but its parameter is " + wanted + "; " +
                             (is_gradient
                                  ? "pass " + what + ".astype('" + wanted + "')"
                                  : "allocate it with " + std::string(view.library()) + ".zeros_like(parameter)"));
    }
    if (!view.same_shape(parameter)) {
        throw py::value_error(name.text() + ": shape " + view.shape_text() + ", but its parameter has shape " +
                              parameter.shape_text());
    }
    if (!view.aligned()) {
        throw py::value_error(name.text() + ": its elements are not aligned to their size; pass a copy (" +
                              view.library() + ".array(x))");
    }
}

// Whether no two elements of a strided array share memory: each dimension, from the widest stride to the
// narrowest, must step over all that the narrower ones cover.
void check_written(const ArrayView& view, const ArrayName& name, const std::string& writer = "a step") {
    if (!view.writeable()) {
        throw py::value_error(name.text() + ": the array is read-only, but " + writer + " writes to it");
    }
    if (view.c_contiguous() || view.f_contiguous()) return;
    std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, length
    for (int d = 0; d < view.dimensions; ++d) {
        if (view.shape[d] == 0) return;
        if (view.shape[d] > 1) dimensions.emplace_back(std::abs(view.strides[d]), view.shape[d]);
    }
    std::sort(dimensions.begin(), dimensions.end());
    int64_t covered = item_size(view.dtype);
    for (const auto& [stride, length] : dimensions) {
        if (stride < covered) {
            throw py::value_error(name.text() +
                                  ": elements of the array overlap in memory (a broadcast or otherwise "
                                  "strided view), but " +
                                  writer + " writes to it; pass a copy (" + view.library() + ".array(x))");
        }
        covered += stride * (length - 1);
    }
}

// The dimensions that all arrays of a parameter can be walked along together, in as few as can be, ordered
// by the parameter's memory. The bases move to the lowest address where every stride of a dimension is
// negative.
void merge_dimensions(const ArrayView* views, int streams, Tensor& tensor, StridedLayout& layout) {
    const ArrayView& p = views[0];
    std::vector<int> order;
    for (int d = 0; d < p.dimensions; ++d) {
        if (p.shape[d] != 1) order.push_back(d);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return std::abs(p.strides[a]) > std::abs(p.strides[b]); });
    layout.shape.clear();
    for (int k = 0; k < streams; ++k) layout.strides[k].clear();
    for (const int d : order) {
        bool flip = true;
        for (int k = 0; k < streams; ++k) flip = flip && views[k].strides[d] < 0;
        bool mergeable = !layout.shape.empty();
        for (int k = 0; k < streams; ++k) {
            int64_t stride = views[k].strides[d];
            if (flip) {
                tensor.streams[k] = static_cast<char*>(tensor.streams[k]) + (p.shape[d] - 1) * stride;
                stride = -stride;
            }
            mergeable = mergeable && layout.strides[k].back() == stride * p.shape[d];
            layout.strides[k].push_back(stride);
        }
        layout.shape.push_back(p.shape[d]);
        if (!mergeable) continue;
        const size_t last = layout.shape.size() - 1;
        layout.shape[last - 1] *= layout.shape[last];
        layout.shape.pop_back();
        for (int k = 0; k < streams; ++k) layout.strides[k].erase(layout.strides[k].end() - 2);
    }
}

bool is_dense(const StridedLayout& layout, int streams, int item) {
    if (layout.shape.empty()) return true;
    if (layout.shape.size() > 1) return false;
    for (int k = 0; k < streams; ++k) {
        if (layout.strides[k][0] != item) return false;
    }
    return true;
}

// An array to ask NumPy about shared memory with. NumPy looks only at addresses, so a GPU's do as well.
py::object as_numpy(const Extent& extent) {
    if (py::isinstance<py::array>(extent.object)) return py::reinterpret_borrow<py::object>(extent.object);
    GpuArrays arrays;
    const ArrayView view = view_array(extent.object, extent.name, arrays);
    const py::dtype dtype = view.dtype == DType::float32 ? py::dtype::of<float>() : py::dtype::of<double>();
    const std::vector<py::ssize_t> shape(view.shape, view.shape + view.dimensions);
    const std::vector<py::ssize_t> strides(view.strides, view.strides + view.dimensions);
    return py::array(dtype, shape, strides, view.data, py::reinterpret_borrow<py::object>(extent.object));
}

}  // namespace

const char* const* stream_roles(int rule) {
    return rule == rule_index<Gd> || rule == rule_index<GdMomentum> ? gd_roles : adam_roles;
}

StridedLayout* LayoutStore::take() {
    if (used_ == layouts_.size()) layouts_.emplace_back();
    return &layouts_[used_++];
}

void check_gradient(const ArrayView& gradient, const ArrayView& parameter, const ArrayName& name) {
    check_like_parameter(gradient, parameter, true, name);
}

void check_zeroed(const ArrayView& gradient, const ArrayName& name) { check_written(gradient, name, "zero_grad=True"); }

Tensor bind(int rule, const ArrayView* views, const ArrayName& name, LayoutStore& layouts) {
    const char* const* roles = stream_roles(rule);
    const RuleStreams& streams = rule_streams[rule];
    const ArrayView& p = views[0];
    if (!p.known_dtype) {
        throw py::type_error(with_role(name, roles[0]).text() + ": " + p.dtype_text() +
                             " parameters are not supported; use float32 or float64 in native byte order");
    }
    Tensor tensor{};
    tensor.size = p.size();
    bool c_contiguous = true, f_contiguous = true;
    for (int k = 0; k < streams.count; ++k) {
        const ArrayName named = with_role(name, roles[k]);
        check_like_parameter(views[k], p, k == 1, named);
        if (streams.written >> k & 1) check_written(views[k], named);
        c_contiguous = c_contiguous && views[k].c_contiguous();
        f_contiguous = f_contiguous && views[k].f_contiguous();
        tensor.streams[k] = views[k].data;
    }
    if (c_contiguous || f_contiguous || tensor.size == 0) return tensor;
    StridedLayout* layout = layouts.take();
    merge_dimensions(views, streams.count, tensor, *layout);
    if (is_dense(*layout, streams.count, item_size(p.dtype)))
        layouts.give_back();
    else
        tensor.layout = layout;
    return tensor;
}

Extent extent_of(const ArrayView& view, bool written, const ArrayName& name) {
    const int item = item_size(view.dtype);
    const int64_t size = view.size();
    Extent extent{view.data, view.data, true, written, view.object, name};
    if (size == 0) return extent;
    if (view.c_contiguous() || view.f_contiguous()) {
        extent.end += size * item;
        return extent;
    }
    for (int d = 0; d < view.dimensions; ++d) {
        const int64_t reach = view.strides[d] * (view.shape[d] - 1);
        (reach < 0 ? extent.begin : extent.end) += reach;
    }
    extent.end += item;
    extent.dense = extent.end - extent.begin == size * item;
    return extent;
}

bool share_memory(const Extent& a, const Extent& b) {
    if (a.begin == a.end || b.begin == b.end) return false;
    if (!(a.begin < b.end && b.begin < a.end)) return false;
    if (a.dense && b.dense) return true;
    // Exact, and NumPy bounds the work: where it gives up, so do we.
    const py::module_ numpy = py::module_::import("numpy");
    try {
        return numpy.attr("shares_memory")(as_numpy(a), as_numpy(b), 1000000).cast<bool>();
    } catch (py::error_already_set& error) {
        if (error.matches(numpy.attr("exceptions").attr("TooHardError"))) return true;
        throw;
    }
}

void throw_overlap(const Extent& a, const Extent& b) {
    const std::string first = a.name.text(), second = b.name.text();
    if (a.object.is(b.object)) {
        throw py::value_error(first + " and " + second + " are the same array; each must have memory of its own");
    }
    throw py::value_error(first + " and " + second + " overlap in memory; each must have memory of its own");
}

void check_overlaps(std::vector<Extent>& extents) {
    const auto by_address = [](const Extent& a, const Extent& b) { return a.begin < b.begin; };
    if (!std::is_sorted(extents.begin(), extents.end(), by_address)) {
        std::sort(extents.begin(), extents.end(), by_address);
    }
    // In order of address, an extent meets an earlier one exactly when it begins before the furthest end
    // so far; two that are only read may meet.
    const Extent* furthest_written = nullptr;
    const Extent* furthest_read = nullptr;
    bool meet = false;
    for (const Extent& extent : extents) {
        if (extent.begin == extent.end) continue;
        meet = meet || (furthest_written != nullptr && extent.begin < furthest_written->end) ||
               (extent.written && furthest_read != nullptr && extent.begin < furthest_read->end);
        const Extent*& furthest = extent.written ? furthest_written : furthest_read;
        if (furthest == nullptr || extent.end > furthest->end) furthest = &extent;
    }
    if (!meet) return;
    // Rare: an error, or strided arrays that interleave. Look at every pair that meets.
    for (size_t i = 0; i < extents.size(); ++i) {
        for (size_t j = i + 1; j < extents.size() && extents[j].begin < extents[i].end; ++j) {
            if (!extents[i].written && !extents[j].written) continue;
            if (share_memory(extents[i], extents[j])) throw_overlap(extents[i], extents[j]);
        }
    }
}

}  // namespace fusedstep
