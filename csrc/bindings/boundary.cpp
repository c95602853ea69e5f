#include "boundary.hpp"

#include <algorithm>
#include <cstdlib>

#include "gpu_arrays.hpp"

namespace fusedstep {
namespace {

constexpr const char* gd_roles[] = {"params", "grads", "momentum_buffer"};
constexpr const char* adam_roles[] = {"params", "grads", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
constexpr const char* gd_extra_roles[] = {"master", nullptr, "momentum_buffer_units"};
constexpr const char* adam_extra_roles[] = {"master", nullptr, "exp_avg_units", "exp_avg_sq_units",
                                            "max_exp_avg_sq_units"};

ArrayName with_role(ArrayName name, const char* role) {
    name.role = role;
    return name;
}

void check_aligned(const ArrayView& view, const ArrayName& name) {
    if (view.aligned()) return;
    throw py::value_error(name.text() + ": its elements are not aligned to their size; pass a copy (" + view.library() +
                          ".array(x))");
}

void check_like_parameter(const ArrayView& view, const ArrayView& parameter, const ArrayName& name) {
    if (!view.same_shape(parameter)) {
        throw py::value_error(name.text() + ": shape " + view.shape_text() + ", but its parameter has shape " +
                              parameter.shape_text());
    }
    check_aligned(view, name);
}

[[noreturn]] void refuse_dtype(const ArrayView& view, const ArrayView& parameter, bool is_gradient,
                               const ArrayName& name) {
    const std::string what = name.text();
    const std::string wanted = fusedstep::name(is_gradient ? parameter.dtype : compute_type(parameter.dtype));
    throw py::type_error(
        what + ": " + view.dtype_text() + ", but its parameter is " + fusedstep::name(parameter.dtype) + "; " +
        (is_gradient
             ? "pass " + what + ".astype('" + wanted + "')"
             : "allocate it with " + std::string(view.library()) + ".zeros_like(parameter, dtype='" + wanted + "')"));
}

// Of an array that is like its parameter, a gradient or a state array.
Format plain_format(const ArrayView& view, const ArrayView& parameter, bool is_gradient, const ArrayName& name) {
    const DType compute = compute_type(parameter.dtype);
    if (view.known_dtype && view.dtype == compute) return Format::native;
    if (view.known_dtype && compute == DType::float32) {
        if (view.dtype == DType::bfloat16) return Format::bfloat16;
        if (view.dtype == DType::float16 && is_gradient) return Format::float16;
    }
    refuse_dtype(view, parameter, is_gradient, name);
}

Format parameter_format(const ArrayView& p, const ArrayView* beside, bool stochastic, const ArrayName& name) {
    const bool narrow = p.known_dtype && (p.dtype == DType::bfloat16 || p.dtype == DType::float16);
    if (!narrow && !p.is_of_compute_type()) {
        throw py::type_error(name.text() + ": " + p.dtype_text() +
                             " parameters are not supported; use float32, float64, bfloat16 or float16 in native byte "
                             "order");
    }
    if (p.dtype == DType::float16) return beside == nullptr ? Format::float16 : Format::float16_master;
    if (p.dtype != DType::bfloat16) return Format::native;
    if (beside == nullptr) return stochastic ? Format::bfloat16_stochastic : Format::bfloat16;
    if (beside->dtype == DType::float32) return Format::bfloat16_master;
    return beside->dtype == DType::uint16 ? Format::bfloat16_correction16 : Format::bfloat16_correction8;
}

bool is_eight_bit(const ArrayView& view) {
    return view.known_dtype && (view.dtype == DType::int8 || view.dtype == DType::uint8);
}

// Codes and the units of their blocks, both vectors.
void check_eight_bit(const ArrayView& codes, const ArrayView* units, DType wanted, const ArrayView& parameter,
                     const ArrayName& name, const ArrayName& units_name) {
    // Only an optimizer gives units.
    if (units == nullptr) refuse_dtype(codes, parameter, false, name);
    if (codes.dtype != wanted || compute_type(parameter.dtype) != DType::float32) {
        throw py::type_error(name.text() + ": " + fusedstep::name(codes.dtype) + ", but expected " +
                             fusedstep::name(wanted) + " beside float32, bfloat16 or float16 parameters");
    }
    const int64_t size = parameter.size();
    if (codes.dimensions != 1 || codes.shape[0] != size || !codes.c_contiguous()) {
        throw py::value_error(name.text() + ": shape " + codes.shape_text() + ", but expected a vector of " +
                              std::to_string(size) + " codes");
    }
    const int64_t blocks = block_count(size);
    if (!units->known_dtype || units->dtype != DType::float32 || units->dimensions != 1 || units->shape[0] != blocks ||
        !units->c_contiguous()) {
        throw py::value_error(units_name.text() + ": expected a float32 vector of " + std::to_string(blocks) +
                              ", one for each " + std::to_string(block_elements) + " elements of the parameter");
    }
    check_aligned(*units, units_name);
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

// An array that is walked along with the others of its parameter.
struct Walked {
    const ArrayView* view;
    void** base;
    std::vector<int64_t>* strides;
};

// The dimensions that all arrays of a parameter can be walked along together, in as few as can be, ordered
// by the parameter's memory, which alone decides the order: 8-bit moments are numbered in it. Where its stride
// is negative, the bases move to the other end.
void merge_dimensions(const std::vector<Walked>& arrays, StridedLayout& layout) {
    const ArrayView& p = *arrays[0].view;
    std::vector<int> order;
    for (int d = 0; d < p.dimensions; ++d) {
        if (p.shape[d] != 1) order.push_back(d);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return std::abs(p.strides[a]) > std::abs(p.strides[b]); });
    layout.shape.clear();
    for (const Walked& array : arrays) array.strides->clear();
    for (const int d : order) {
        const bool flip = p.strides[d] < 0;
        bool mergeable = !layout.shape.empty();
        for (const Walked& array : arrays) {
            int64_t stride = array.view->strides[d];
            if (flip) {
                *array.base = static_cast<char*>(*array.base) + (p.shape[d] - 1) * stride;
                stride = -stride;
            }
            mergeable = mergeable && array.strides->back() == stride * p.shape[d];
            array.strides->push_back(stride);
        }
        layout.shape.push_back(p.shape[d]);
        if (!mergeable) continue;
        const size_t last = layout.shape.size() - 1;
        layout.shape[last - 1] *= layout.shape[last];
        layout.shape.pop_back();
        for (const Walked& array : arrays) array.strides->erase(array.strides->end() - 2);
    }
}

bool is_dense(const StridedLayout& layout, const std::vector<Walked>& arrays) {
    if (layout.shape.empty()) return true;
    if (layout.shape.size() > 1) return false;
    return std::all_of(arrays.begin(), arrays.end(),
                       [](const Walked& array) { return array.strides->front() == item_size(array.view->dtype); });
}

// An array to ask NumPy about shared memory with. NumPy looks only at addresses, so a GPU's do as well.
py::object as_numpy(const Extent& extent) {
    if (py::isinstance<py::array>(extent.object)) return py::reinterpret_borrow<py::object>(extent.object);
    GpuArrays arrays;
    const ArrayView view = view_array(extent.object, extent.name, arrays);
    const py::dtype dtype(std::string("V") + std::to_string(item_size(view.dtype)));
    const std::vector<py::ssize_t> shape(view.shape, view.shape + view.dimensions);
    const std::vector<py::ssize_t> strides(view.strides, view.strides + view.dimensions);
    return py::array(dtype, shape, strides, view.data, py::reinterpret_borrow<py::object>(extent.object));
}

}  // namespace

const char* const* stream_roles(int rule) {
    return rule == rule_index<Gd> || rule == rule_index<GdMomentum> ? gd_roles : adam_roles;
}

const char* const* extra_roles(int rule) { return stream_roles(rule) == gd_roles ? gd_extra_roles : adam_extra_roles; }

bool is_walked(const ArrayView& view, int k) { return k < 2 || !is_eight_bit(view); }

void check_gradient(const ArrayView& gradient, const ArrayView& parameter, const ArrayName& name) {
    plain_format(gradient, parameter, true, name);
    check_like_parameter(gradient, parameter, name);
}

void check_zeroed(const ArrayView& gradient, const ArrayName& name) { check_written(gradient, name, "zero_grad=True"); }

Tensor bind(int rule, const ParameterViews& views, const ArrayName& name, StepStores& stores) {
    const char* const* roles = stream_roles(rule);
    const RuleStreams& streams = rule_streams[rule];
    const ArrayView& p = views.streams[0];
    Storage storage;
    Tensor tensor{};
    bool native = true, c_contiguous = true, f_contiguous = true;
    for (int k = 0; k < streams.count; ++k) {
        const ArrayView& view = views.streams[k];
        const ArrayView* const extra = views.extra(k);
        const ArrayName named = with_role(name, roles[k]);
        Format& format = storage.formats[k];
        if (is_walked(view, k)) {
            format =
                k == 0 ? parameter_format(p, extra, views.stochastic, named) : plain_format(view, p, k == 1, named);
            check_like_parameter(view, p, named);
            c_contiguous = c_contiguous && view.c_contiguous();
            f_contiguous = f_contiguous && view.f_contiguous();
        } else {
            format = k == 2 ? Format::signed8 : Format::unsigned8;
            check_eight_bit(view, extra, k == 2 ? DType::int8 : DType::uint8, p, named,
                            with_role(name, extra_roles(rule)[k]));
        }
        if (streams.written >> k & 1) check_written(view, named);
        tensor.streams[k] = view.data;
        native = native && format == Format::native;
        if (extra == nullptr) continue;
        const ArrayName extra_name = with_role(name, extra_roles(rule)[k]);
        if (k == 0) {
            check_like_parameter(*extra, p, extra_name);
            c_contiguous = c_contiguous && extra->c_contiguous();
            f_contiguous = f_contiguous && extra->f_contiguous();
        }
        check_written(*extra, extra_name);
        storage.extras[k] = extra->data;
    }
    tensor.size = p.size();
    if (tensor.size == 0) return tensor;
    if (!c_contiguous && !f_contiguous)
        tensor.layout = stores.layouts.fill([&](StridedLayout& layout) {
            std::vector<Walked> walked;
            for (int k = 0; k < streams.count; ++k) {
                if (is_walked(views.streams[k], k)) {
                    walked.push_back({&views.streams[k], &tensor.streams[k], &layout.strides[k]});
                }
            }
            if (views.extra(0) != nullptr) {
                walked.push_back({views.extra(0), &storage.extras[0], &layout.extra_strides[0]});
            }
            merge_dimensions(walked, layout);
            return !is_dense(layout, walked);
        });
    if (!native)
        tensor.storage = stores.storages.fill([&](Storage& kept) {
            kept = storage;
            return true;
        });
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
