#include "parameter_list.hpp"

#include <algorithm>

#include "../formats/random.hpp"

namespace fusedstep {

void ParameterList::add_parameter(const py::list& params, const py::list& keys, const py::list& state,
                                  const py::list& suffixes, const py::list& extras, bool stochastic, size_t i, int rule,
                                  size_t group) {
    Parameter& parameter = parameters_.emplace_back();
    parameter.object = params[i];
    parameter.key = keys[i];
    parameter.suffix = suffixes[i].cast<std::string>();
    for (const py::handle arrays : state) {
        parameter.state.push_back(py::reinterpret_borrow<py::list>(arrays)[i]);
    }
    parameter.group = group;
    parameter.rule = rule;
    parameter.stochastic = stochastic;
    for (size_t k = 0; k < extras.size(); ++k) {
        const py::object extra = py::reinterpret_borrow<py::list>(extras[k])[i];
        if (!extra.is_none()) parameter.extras[k] = extra;
    }
    parameter.view = view_array(parameter.object, {"params", -1, &parameter.suffix}, call_.gpu_arrays);
    // The gradient's place is taken by the parameter itself: it is the one array whose layout is known.
    StepStores stores;
    const ParameterViews views = views_of(parameter, parameter.view);
    Tensor tensor = bind(parameter.rule, views, {"", -1, &parameter.suffix}, stores);
    if (tensor.storage != nullptr) {
        parameter.storage = *tensor.storage;
        tensor.storage = &parameter.storage;
    }
    for (int k = 0; k < rule_streams[parameter.rule].count; ++k) {
        const ArrayView& like = k == 0 && views.has_extra[0] ? views.extras[0] : views.streams[k];
        if (!is_walked(views.streams[k], k)) continue;
        parameter.c_contiguous = parameter.c_contiguous && views.streams[k].c_contiguous() && like.c_contiguous();
        parameter.f_contiguous = parameter.f_contiguous && views.streams[k].f_contiguous() && like.f_contiguous();
    }
    parameter.shape.assign(parameter.view.shape, parameter.view.shape + parameter.view.dimensions);
    parameter.strides.assign(parameter.view.strides, parameter.view.strides + parameter.view.dimensions);
    // What a view points to does not outlive a call.
    parameter.view.shape = parameter.shape.data();
    parameter.view.strides = parameter.strides.data();
    if (is_cupy_array(parameter.object)) {
        parameter.cupy_dtype = parameter.object.attr("dtype");
        if (!cupy_reader_) cupy_reader_ = std::make_unique<CupyReader>(parameter.object);
    }
    watches_.push_back(watch_of(parameter, tensor));
    shapes_.insert(shapes_.end(), parameter.shape.begin(), parameter.shape.end());
    tensors_.push_back(tensor);
    ends_.push_back((ends_.empty() ? 0 : ends_.back()) + tensor.size);
    steps_.push_back(0);
}

Watch ParameterList::watch_of(const Parameter& parameter, const Tensor& tensor) const {
    Watch watch{};
    watch.array = parameter.object.ptr();
    watch.data = parameter.view.data;
    watch.bytes = tensor.size * item_size(parameter.view.dtype);
    watch.rule = static_cast<int8_t>(parameter.rule);
    watch.dtype = compute_type(parameter.view.dtype);
    watch.shape = shapes_.size();
    watch.usual = parameter.view.device == ArrayView::host && parameter.c_contiguous;
    if (watch.usual) {
        const auto* const array = py::detail::array_proxy(watch.array);
        watch.descriptor = array->descr;
        watch.flags = array->flags;
        watch.dimensions = static_cast<int8_t>(array->nd);
    }
    return watch;
}

ParameterViews ParameterList::views_of(const Parameter& parameter, const ArrayView& gradient) {
    const char* const* roles = stream_roles(parameter.rule);
    ParameterViews views;
    views.streams[0] = view_array(parameter.object, {"params", -1, &parameter.suffix}, call_.gpu_arrays);
    views.streams[1] = gradient;
    for (size_t k = 0; k < parameter.state.size(); ++k) {
        const ArrayName name{roles[2 + k], -1, &parameter.suffix};
        views.streams[2 + k] = view_array(parameter.state[k], name, call_.gpu_arrays);
    }
    for (int k = 0; k < max_streams; ++k) {
        views.has_extra[k] = static_cast<bool>(parameter.extras[k]);
        if (!views.has_extra[k]) continue;
        const ArrayName name{extra_roles(parameter.rule)[k], -1, &parameter.suffix};
        views.extras[k] = view_array(parameter.extras[k], name, call_.gpu_arrays);
    }
    views.stochastic = parameter.stochastic;
    return views;
}

void ParameterList::find_owned() {
    owned_.clear();
    Placement placement;
    for (const Parameter& parameter : parameters_) {
        const ParameterViews views = views_of(parameter, parameter.view);
        const auto own = [&](const ArrayView& view, const char* role) {
            const ArrayName name{role, -1, &parameter.suffix};
            placement.check(view, name);
            const Extent extent = extent_of(view, true, name);
            if (extent.begin != extent.end) owned_.push_back(extent);
        };
        for (int k = 0; k < rule_streams[parameter.rule].count; ++k) {
            if (k != 1) own(views.streams[k], stream_roles(parameter.rule)[k]);
            if (views.has_extra[k]) own(views.extras[k], extra_roles(parameter.rule)[k]);
        }
    }
    one_job_ = !watches_.empty();
    for (size_t i = 0; i < watches_.size(); ++i) {
        Watch& watch = watches_[i];
        watch.gap_begin = watch.gap_end = nullptr;
        one_job_ = one_job_ && watch.usual && watch.rule == watches_[0].rule && watch.dtype == watches_[0].dtype &&
                   tensors_[i].storage == nullptr;
    }
    owned_dense_ = std::all_of(owned_.begin(), owned_.end(), [](const Extent& extent) { return extent.dense; });
    check_overlaps(owned_);
}

void ParameterList::check_zeroed_gradients(const std::vector<py::object>& gradients) {
    for (size_t i = 0; i < parameters_.size(); ++i) {
        if (gradients[i].is_none()) continue;
        const ArrayName name{"grads", -1, &parameters_[i].suffix};
        const ArrayView gradient = view_array(gradients[i], name, call_.gpu_arrays);
        check_zeroed(gradient, name);
        call_.extents.push_back(extent_of(gradient, true, name));
    }
    check_overlaps(call_.extents);
}

Tensor ParameterList::checked_tensor(int64_t i, py::handle object) {
    const Parameter& parameter = parameters_[i];
    const ArrayName name{"grads", -1, &parameter.suffix};
    const ArrayName own_name{"params", -1, &parameter.suffix};
    const ArrayView p = view_array(parameter.object, own_name, call_.gpu_arrays);
    const ArrayView gradient = view_array(object, name, call_.gpu_arrays);
    call_.placement.check(p, own_name);
    call_.placement.check(gradient, name);
    if (!unchanged(parameter, p)) throw_changed(parameter, p);
    check_gradient(gradient, p, name);
    Tensor tensor = tensors_[i];
    tensor.streams[1] = gradient.data;
    if (gradient.dtype != p.dtype || (!(parameter.c_contiguous && gradient.c_contiguous()) &&
                                      !(parameter.f_contiguous && gradient.f_contiguous()))) {
        const ParameterViews views = views_of(parameter, gradient);
        tensor = bind(parameter.rule, views, {"", -1, &parameter.suffix}, call_.stores);
        if (tensor.storage != nullptr)
            call_.stores.set_random(random_stream(seed_, steps_[i] + 1), parameter.storage.random_on_gpu);
    }
    check_gradient_memory(watches_[i], gradient, name);
    return tensor;
}

void ParameterList::check_gradient_memory(Watch& watch, const ArrayView& gradient, const ArrayName& name) {
    const Extent extent = extent_of(gradient, false, name);
    if (extent.begin >= watch.gap_begin && extent.end <= watch.gap_end) return;
    const auto after = std::partition_point(owned_.begin(), owned_.end(),
                                            [&](const Extent& owned) { return owned.begin < extent.end; });
    // Arrays with gaps may interleave, so every one that begins before the gradient's end is a
    // candidate; without them, only the last one is.
    const char* before_end = nullptr;
    for (auto owned = after; owned != owned_.begin();) {
        --owned;
        if (share_memory(*owned, extent)) {
            // It may be memory that a parameter has left.
            for (const Parameter& other : parameters_) {
                const ArrayView p = view_array(other.object, {"params", -1, &other.suffix}, call_.gpu_arrays);
                if (!unchanged(other, p)) throw_changed(other, p);
            }
            throw_overlap(*owned, extent);
        }
        before_end = std::max(before_end, owned->end);
        if (owned_dense_) break;
    }
    watch.gap_begin = before_end;
    watch.gap_end = after == owned_.end() ? reinterpret_cast<const char*>(UINTPTR_MAX) : after->begin;
}

bool ParameterList::unchanged(const Parameter& parameter, const ArrayView& p) {
    const ArrayView& then = parameter.view;
    if (p.data != then.data || p.flags != then.flags || p.dimensions != then.dimensions || !p.known_dtype ||
        p.dtype != then.dtype) {
        return false;
    }
    const bool dense = p.c_contiguous() || p.f_contiguous();
    for (int d = 0; d < p.dimensions; ++d) {
        if (p.shape[d] != parameter.shape[d] || (!dense && p.strides[d] != parameter.strides[d])) return false;
    }
    return true;
}

void ParameterList::throw_changed(const Parameter& parameter, const ArrayView& p) {
    const std::string name = ArrayName{"params", -1, &parameter.suffix}.text();
    if (!p.writeable()) throw py::value_error(name + ": the array is read-only, but a step writes to it");
    throw py::value_error(name +
                          ": the memory, shape or layout of the array changed after the optimizer was "
                          "made; make a new optimizer and load this one's state_dict()");
}

void ParameterList::shorten(size_t count) {
    parameters_.erase(parameters_.begin() + count, parameters_.end());
    watches_.resize(count);
    tensors_.resize(count);
    ends_.resize(count);
    steps_.resize(count);
}

}  // namespace fusedstep
