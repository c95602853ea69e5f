#include "optimizer.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "../cpu/parallel_for.hpp"
#include "../formats/random.hpp"
#include "fast_function.hpp"
#include "group_reader.hpp"
#include "parameter_list.hpp"
#include "torch_tensors.hpp"

namespace fusedstep {
namespace {

// How a group's arrays were given, and so how its gradients come.
enum class Structure { array, list, dict };

template <class Hyper>
struct Group {
    Structure structure;
    int64_t first, count;
    std::vector<PyObject*> arrays;  // of its parameters
    int64_t latest;                 // the largest step count among its parameters
    py::object state_object;        // keeps `state`
    GroupState<Hyper>* state;       // on the GPU; null: steps are counted here
    float* counts = nullptr;        // there, of PyTorch's: the step count once more for each parameter
};

// Of fewer arrays, checking takes no longer than sharing it.
constexpr int64_t least_shared_checks = 200;

// An item of a list or tuple, owned: another thread may change the list.
py::object item_of(py::handle sequence, int64_t i) {
    if (PyTuple_Check(sequence.ptr())) {
        return py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(sequence.ptr(), i));
    }
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* const item = PyList_GetItemRef(sequence.ptr(), i);
    if (item == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(item);
#else
    // The list may have become shorter: comparing the keys of a dict runs code of the user's.
    if (i >= PyList_GET_SIZE(sequence.ptr())) throw py::value_error("a list changed while a step was reading it");
    return py::reinterpret_borrow<py::object>(PyList_GET_ITEM(sequence.ptr(), i));
#endif
}

bool is_list(py::handle object) { return PyList_Check(object.ptr()) || PyTuple_Check(object.ptr()); }

int64_t length(py::handle sequence) { return static_cast<int64_t>(PySequence_Fast_GET_SIZE(sequence.ptr())); }

// Fetches what a check will look at while others are being checked: objects lie anywhere.
void prefetch_object(PyObject* object) {
    __builtin_prefetch(object);
    __builtin_prefetch(reinterpret_cast<char*>(object) + sizeof(py::detail::PyArray_Proxy) - 1);
}

void prefetch_shapes(PyObject* array, PyObject* gradient) {
    __builtin_prefetch(py::detail::array_proxy(array)->dimensions);
    if (Py_TYPE(gradient) == Py_TYPE(array)) __builtin_prefetch(py::detail::array_proxy(gradient)->dimensions);
}

// Of a dict, and of no other: it changes whenever an item does. From 3.12 on Python has none, which is 0 here.
uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
    (void)dict;
    return 0;
#endif
}

template <class Hyper>
class Optimizer : private ParameterList {
public:
    static constexpr size_t group_state_bytes = sizeof(GroupState<Hyper>);

    Optimizer(bool decoupled, uint64_t seed) : ParameterList(seed), decoupled_(decoupled) {}

    // Adds a group of parameters; state[k][i] is state array k of parameter i, and `group_state` is None or a
    // GPU array of `group_state_bytes` zeros. Nothing is added if any of it is refused.
    //
    // `extras[k]` has what lies beside stream k of each parameter, or None; `stochastic` is how a bfloat16
    // parameter with nothing beside it is rounded.
    void add_group(const std::string& structure, const py::list& params, const py::list& keys, const py::list& state,
                   const py::list& suffixes, const py::object& group_state, const py::list& extras, bool stochastic) {
        const std::lock_guard<Optimizer> lock(*this);
        const size_t before = parameters_.size();
        std::vector<PyObject*> arrays;
        GroupState<Hyper>* state_on_gpu = nullptr;
        call_.clear();
        const int rule = Family<Hyper>::rule(state.size());
        try {
            for (size_t i = 0; i < params.size(); ++i) {
                add_parameter(params, keys, state, suffixes, extras, stochastic, i, rule, groups_.size());
                arrays.push_back(parameters_.back().object.ptr());
            }
            find_owned();
            state_on_gpu = on_gpu(group_state, before);
        } catch (...) {
            shorten(before);
            find_owned();
            throw;
        }
        groups_.push_back({structure == "array"  ? Structure::array
                           : structure == "list" ? Structure::list
                                                 : Structure::dict,
                           static_cast<int64_t>(before), static_cast<int64_t>(params.size()), std::move(arrays), 0,
                           group_state, state_on_gpu});
        find_latest();
    }

    // Checks a group's hyper-parameters as far as that goes without calling its schedules.
    void check_group(py::handle group, int64_t number, size_t state_arrays, bool capturable) const {
        HyperSource source{"param_groups[" + std::to_string(number) + "]: ", capturable ? 0 : 1, false};
        source.lr_on_gpu = capturable && is_lr_on_gpu(group);
        Hyper hyper = Family<Hyper>::read(group, Family<Hyper>::rule(state_arrays), source);
        hyper.grad_scale = 1;
        check_hyper(hyper, source);
    }

    // `nested`: the gradients come as a list with one entry for each group.
    //
    // Whatever may run Python code of the user's (schedules, keys of a dict, the end of a gradient) is done
    // without the lock, since that code may use this optimizer.
    StepOutcome step(py::handle param_groups, py::handle grads, const GradientOptions& options, bool nested) {
        Preparation prepared = begin();
        if (options.skip_nonfinite) check_skipping();
        hold_dicts(param_groups, prepared);
        for (size_t g = 0; g < prepared.groups.size(); ++g)
            read_group(prepared.groups[g], groups_[g], options.grad_scale);
        for (PreparedGroup& group : prepared.groups) {
            PyObject* const params = PyDict_GetItemWithError(group.dict.ptr(), keys().params.ptr());
            if (params == nullptr && PyErr_Occurred()) throw py::error_already_set();
            group.params = py::reinterpret_borrow<py::object>(params);
        }
        StepOutcome outcome;
        if (!options.needs_norm() && !options.zero_grad && run_usual(grads, nested, prepared)) {
            end(prepared);
            return outcome;
        }
        gather(grads, nested, prepared);
        {
            const std::lock_guard<Optimizer> lock(*this);
            if (prepared.gradients.size() != parameters_.size()) {
                throw py::value_error("param_groups: a group was added while a step was being prepared");
            }
            for (const Group<Hyper>& group : groups_) {
                if (group.state != nullptr) check_all_have_gradients(group, prepared);
            }
            outcome = run(prepared, options, {});
        }
        end(prepared);
        return outcome;
    }

    // Whether a step looks at a tensor itself, and not at an array of it: then it would see another one in its place.
    bool reads_tensor(py::handle tensor) { return tensor_reader_.shape(tensor) != nullptr; }

    // Steps that find their gradients themselves, of tensors of PyTorch whose memory the parameters share.
    //
    // For each of PyTorch's groups: how many of the groups here have its parameters, and pairs of a tensor and the
    // number of its parameter, or -1 where no gradient is expected. `state` is the items of the state as PyTorch has
    // it, `counts` the step count of each parameter in PyTorch's memory, or None; where a group's steps are counted on
    // the GPU, `group_counts` has a vector there for those of its parameters, or None. `versioned` has for each
    // parameter a tensor with its version counter, and `raise_versions` raises those of a list of them, or is None.
    // `as_array` makes an array of a tensor.
    void watch_tensors(const py::list& groups, const py::list& state, const py::list& counts,
                       const py::list& group_counts, const py::list& versioned, const py::object& raise_versions,
                       const py::object& as_array) {
        const std::lock_guard<Optimizer> lock(*this);
        for (const py::handle group : groups) {
            WatchedGroup& watched = watched_groups_.emplace_back();
            const auto pair = py::reinterpret_borrow<py::tuple>(group);
            watched.groups = pair[0].cast<int64_t>();
            for (const py::handle item : pair[1]) {
                const auto tensor = py::reinterpret_borrow<py::tuple>(item);
                const auto number = tensor[1].cast<int64_t>();
                const DType dtype = number < 0 ? DType::float32 : parameters_[number].view.dtype;
                watched.tensors.push_back({tensor[0], number, dtype});
                watched.tensors.back().shape = tensor_reader_.shape(tensor[0]);
            }
        }
        for (const py::handle item : state) watched_state_.emplace_back(py::reinterpret_borrow<py::tuple>(item));
        for (const py::handle count : counts) {
            const bool counted = !count.is_none();
            counts_.push_back(
                {py::reinterpret_borrow<py::object>(count),
                 counted ? reinterpret_cast<float*>(py::detail::array_proxy(count.ptr())->data) : nullptr});
        }
        call_.clear();
        for (size_t g = 0; g < groups_.size(); ++g) {
            const py::object own = group_counts[g];
            if (!own.is_none())
                groups_[g].counts = reinterpret_cast<float*>(view_array(own, {"counts"}, call_.gpu_arrays).data);
        }
        group_counts_ = group_counts;
        versioned_ = versioned;
        raise_versions_ = raise_versions;
        as_array_ = as_array;
    }

    // Returns what `versioned` has for those that were stepped and whose versions are still to be raised; None, and
    // nothing changed, where tensors or state are not those that are watched, or some parameters have a gradient and
    // others none whose steps a GPU counts together.
    //
    // `loss_scaling` is None, or, for steps that are counted on a GPU, what a loss scaler has left there: the scale of
    // the gradients and whether one of them is not finite, each an array of one float32 or None.
    py::object step_tensors(py::handle param_groups, py::handle state, py::handle grad_scale, py::handle loss_scaling) {
        const double scale = read_number(grad_scale, "grad_scale", {});
        ScalingArrays scaling;
        if (!loss_scaling.is_none()) {
            const auto arrays = py::reinterpret_borrow<py::tuple>(loss_scaling);
            scaling = {arrays[0], arrays[1]};
        }
        Preparation prepared = begin();
        bool as_watched = hold_watched_dicts(param_groups, prepared);
        for (size_t g = 0; as_watched && g < groups_.size(); ++g) {
            PreparedGroup& group = prepared.groups[g];
            read_group(group, groups_[g], scale);
            if constexpr (std::is_same_v<Hyper, GdHyper>) {
                const bool has_momentum = parameters_[groups_[g].first].rule == rule_index<GdMomentum>;
                as_watched = (group.hyper.momentum != 0) == has_momentum;
            }
        }
        bool versions_raised = false;
        if (as_watched) {
            const std::lock_guard<Optimizer> lock(*this);
            as_watched =
                is_state_as_watched(state) && gather_tensors(param_groups, prepared) && are_stepped_together(prepared);
            if (as_watched && !run_usual_tensors(prepared, versions_raised)) run(prepared, {}, scaling);
        }
        py::object stepped = py::none();
        if (as_watched) stepped = versions_raised ? py::list() : stepped_tensors(prepared);
        end(prepared);
        return stepped;
    }

    // Of the memory that a norm on a GPU needs.
    int64_t norm_workspace_bytes() {
        const std::lock_guard<Optimizer> lock(*this);
        int64_t blocks = 0;
        for (const Tensor& tensor : tensors_) blocks += norm_blocks(tensor.size);
        return fusedstep::norm_workspace_bytes(blocks, static_cast<int64_t>(tensors_.size()));
    }

    // Where in the GPU's memory the norm is computed, and where to: arrays as `norm_workspace_bytes` says and of a
    // NormOutcome.
    void place_norm(const py::object& workspace, const py::object& outcome, GradientOptions& options) {
        const std::lock_guard<Optimizer> lock(*this);
        call_.clear();
        const ArrayName name{"the norm's workspace"};
        options.norm_workspace = reinterpret_cast<double*>(view_array(workspace, name, call_.gpu_arrays).data);
        options.norm_outcome = reinterpret_cast<NormOutcome*>(view_array(outcome, name, call_.gpu_arrays).data);
    }

    std::vector<int64_t> steps() {
        const std::lock_guard<Optimizer> lock(*this);
        return steps_;
    }

    void set_steps(const std::vector<int64_t>& steps) {
        const std::lock_guard<Optimizer> lock(*this);
        if (steps.size() != parameters_.size()) throw py::value_error("steps: one for each parameter expected");
        steps_ = steps;
        find_latest();
    }

    // One lock per optimizer. A thread that waits for it lets go of the GIL first; one that has it already
    // (a gradient's own code, a finaliser) would wait for ever.
    void lock() {
        const std::thread::id self = std::this_thread::get_id();
        if (owner_.load(std::memory_order_relaxed) == self)
            throw std::runtime_error("this optimizer is in the middle of a step on this thread");
        if (!mutex_.try_lock()) {
            const py::gil_scoped_release release;
            mutex_.lock();
        }
        owner_.store(self, std::memory_order_relaxed);
    }
    void unlock() {
        owner_.store({}, std::memory_order_relaxed);
        mutex_.unlock();
    }

private:
    void find_latest() {
        for (Group<Hyper>& group : groups_) {
            group.latest = *std::max_element(steps_.begin() + group.first, steps_.begin() + group.first + group.count);
        }
    }

    // What a step has read of Python before it takes the lock.
    struct PreparedGroup {
        HyperSource source;
        py::object dict;    // held: a schedule may change the list of them
        py::object params;  // what it has as such, or null
        Hyper hyper;
    };

    struct Preparation {
        std::vector<PreparedGroup> groups;
        std::vector<py::object> gradients;  // of each parameter, or None
        std::vector<char*> memory;          // of each gradient that needs no further check; empty: of none

        void clear() {
            groups.clear();
            gradients.clear();
            memory.clear();
        }
    };

    Preparation begin() {
        Preparation prepared;
        const std::lock_guard<Optimizer> lock(*this);
        std::swap(prepared, spare_);
        for (size_t g = 0; g < groups_.size(); ++g) {
            HyperSource& source = prepared.groups.emplace_back().source;
            if (groups_.size() > 1) source.prefix = "param_groups[" + std::to_string(g) + "]: ";
            source.step = groups_[g].latest + 1;
        }
        return prepared;
    }

    void end(Preparation& prepared) {
        prepared.clear();
        const std::lock_guard<Optimizer> lock(*this);
        std::swap(prepared, spare_);
    }

    // The items of the lists of a group in a usual step, and its scalars.
    struct UsualGroup {
        PyObject *const *params, *const *gradients;
        const void* scalars;
    };

    struct WatchedTensor {
        py::object tensor;
        int64_t parameter;
        DType dtype;
        // Where the shape is, which is a part of the tensor; and of the last gradient, to be fetched.
        const int64_t* shape = nullptr;
        const int64_t* gradient_shape = nullptr;
        const PyObject* gradient = nullptr;
    };

    struct WatchedGroup {
        int64_t groups;  // of those here, one after the other
        std::vector<WatchedTensor> tensors;
    };

    // A parameter's entry in PyTorch's state, and what is in it.
    struct WatchedEntry {
        explicit WatchedEntry(const py::tuple& item) : key(item[0]), entry(item[1]) {
            for (const auto& [name, value] : py::dict(entry))
                values.push_back(py::reinterpret_borrow<py::object>(value));
        }

        bool is(PyObject* other_key, PyObject* other_entry) const {
            if (other_key != key.ptr() || other_entry != entry.ptr()) return false;
            size_t i = 0;
            Py_ssize_t place = 0;
            for (PyObject* value; PyDict_Next(other_entry, &place, nullptr, &value); ++i) {
                if (i == values.size() || value != values[i].ptr()) return false;
            }
            return i == values.size();
        }

        py::object key, entry;
        std::vector<py::object> values;
        uint64_t version = 0;  // of the entry, when it was compared
    };

    // A step count in PyTorch's memory, which an array keeps.
    struct Count {
        py::object array;
        float* memory;
    };

    bool is_state_as_watched(py::handle state) {
        if (!PyDict_Check(state.ptr())) return false;
        if (is_state_unchanged(state)) return true;
        size_t i = 0;
        Py_ssize_t place = 0;
        PyObject *key, *entry;
        for (; PyDict_Next(state.ptr(), &place, &key, &entry); ++i) {
            if (i == watched_state_.size() || !watched_state_[i].is(key, entry)) return false;
            watched_state_[i].version = version_of(entry);
        }
        if (i != watched_state_.size()) return false;
        state_version_ = version_of(state.ptr());
        return true;
    }

    // Since it was compared, which takes much longer.
    bool is_state_unchanged(py::handle state) const {
        if (state_version_ == 0 || version_of(state.ptr()) != state_version_) return false;
        const size_t count = watched_state_.size();
        for (size_t i = 0; i < count; ++i) {
            if (i + 16 < count) __builtin_prefetch(watched_state_[i + 16].entry.ptr());
            if (version_of(watched_state_[i].entry.ptr()) != watched_state_[i].version) return false;
        }
        return true;
    }

    bool hold_watched_dicts(py::handle param_groups, Preparation& prepared) const {
        if (!PyList_Check(param_groups.ptr()) ||
            PyList_GET_SIZE(param_groups.ptr()) != static_cast<py::ssize_t>(watched_groups_.size()))
            return false;
        size_t held = 0;
        for (size_t g = 0; g < watched_groups_.size(); ++g) {
            const py::object dict = item_of(param_groups, g);
            if (!PyDict_Check(dict.ptr())) return false;
            for (int64_t k = 0; k < watched_groups_[g].groups; ++k) prepared.groups[held++].dict = dict;
        }
        return true;
    }

    // Whether no group that is counted on the GPU has gradients for some of its parameters alone.
    bool are_stepped_together(const Preparation& prepared) const {
        return std::all_of(groups_.begin(), groups_.end(), [&](const Group<Hyper>& group) {
            if (group.state == nullptr) return true;
            const int64_t given = gradients_of(group, prepared);
            return given == 0 || given == group.count;
        });
    }

    static int64_t gradients_of(const Group<Hyper>& group, const Preparation& prepared) {
        const auto first = prepared.gradients.begin() + group.first;
        return std::count_if(first, first + group.count, [](const py::object& g) { return !g.is_none(); });
    }

    bool gather_tensors(py::handle param_groups, Preparation& prepared) {
        prepared.gradients.assign(parameters_.size(), py::none());
        prepared.memory.assign(parameters_.size(), nullptr);
        for (size_t g = 0; g < watched_groups_.size(); ++g) {
            std::vector<WatchedTensor>& tensors = watched_groups_[g].tensors;
            PyObject* const params =
                PyDict_GetItemWithError(PyList_GET_ITEM(param_groups.ptr(), g), keys().params.ptr());
            if (params == nullptr || !PyList_Check(params) ||
                PyList_GET_SIZE(params) != static_cast<py::ssize_t>(tensors.size()))
                return false;
            for (size_t i = 0; i < tensors.size(); ++i) {
                if (i + 8 < tensors.size()) prefetch_tensor(tensors[i + 8]);
                WatchedTensor& watched = tensors[i];
                if (PyList_GET_ITEM(params, i) != watched.tensor.ptr()) return false;
                py::object gradient = tensor_reader_.gradient(watched.tensor);
                if (gradient.is_none()) continue;
                if (watched.parameter < 0 || !find_tensor_gradient(watched, gradient, prepared)) return false;
                prepared.gradients[watched.parameter] = std::move(gradient);
            }
        }
        return true;
    }

    // What looking at a tensor and its gradient fetches.
    void prefetch_tensor(const WatchedTensor& watched) const {
        __builtin_prefetch(watched.tensor.ptr());
        __builtin_prefetch(watched.gradient);
        if (watched.parameter >= 0) __builtin_prefetch(counts_[watched.parameter].memory);
        for (const int64_t* const shape : {watched.shape, watched.gradient_shape}) {
            if (shape == nullptr) continue;
            for (int line = -1; line <= 2; ++line) __builtin_prefetch(shape + 8 * line);
        }
    }

    py::list stepped_tensors(const Preparation& prepared) const {
        const auto& gradients = prepared.gradients;
        if (std::none_of(gradients.begin(), gradients.end(), [](const py::object& g) { return g.is_none(); }))
            return versioned_;
        py::list stepped;
        for (size_t i = 0; i < gradients.size(); ++i) {
            if (!gradients[i].is_none()) stepped.append(versioned_[i]);
        }
        return stepped;
    }

    // Finds where a gradient lies, if parameter and gradient are as usual, or makes an array of it. False if the
    // parameter is not as it was.
    bool find_tensor_gradient(WatchedTensor& watched, py::object& gradient, Preparation& prepared) {
        const int64_t i = watched.parameter;
        Watch& watch = watches_[i];
        const py::ssize_t* const shape = shapes_.data() + watch.shape;
        const auto is_usual = [&](py::handle tensor, TorchReader::Place& place) {
            return watch.usual && tensor_reader_.read(tensor, watched.dtype, shape, watch.dimensions, place);
        };
        read_count(i);
        TorchReader::Place p, g;
        if (is_usual(watched.tensor, p)) {
            // Another tensor may have been put in its place, even one of the same memory.
            if (p.shape != watched.shape) return false;
            if (watch.bytes == 0) {
                prepared.memory[i] = parameters_[i].view.data;  // an empty tensor has none of its own
                return true;
            }
            if (p.data != watch.data) return false;
            if (is_usual(gradient, g)) {
                watched.gradient_shape = g.shape;
                watched.gradient = gradient.ptr();
                if (g.data < watch.gap_begin || g.data + watch.bytes > watch.gap_end) {
                    ArrayView view = parameters_[i].view;
                    view.data = g.data;
                    view.object = gradient;
                    check_gradient_memory(watch, view, {"grads", -1, &parameters_[i].suffix});
                }
                prepared.memory[i] = g.data;
                return true;
            }
        } else {
            const Parameter& parameter = parameters_[i];
            const py::object array = as_array_(watched.tensor);
            if (!unchanged(parameter, view_array(array, {"params", -1, &parameter.suffix}, call_.gpu_arrays)))
                return false;
        }
        gradient = as_array_(gradient);
        return true;
    }

    // A step count may have been set where PyTorch keeps it. Beyond 2^24 a float32 no longer counts, but we do.
    void read_count(int64_t i) {
        const float* const count = counts_[i].memory;
        if (count == nullptr || *count == static_cast<float>(steps_[i])) return;
        if (!(*count >= 0) || *count >= 0x1p62f || *count != std::floor(*count)) {
            throw py::value_error("state" + parameters_[i].suffix + "['step']: expected an integer, got " +
                                  std::to_string(*count));
        }
        steps_[i] = static_cast<int64_t>(*count);
    }

    void write_count(int64_t i) {
        if (counts_[i].memory != nullptr) *counts_[i].memory = static_cast<float>(steps_[i]);
    }

    // The usual step: nothing is new but where the gradients lie. False, and nothing is done, where that is not so: the
    // general step looks closer, and says what is wrong.
    //
    // It looks at lists and arrays without holding them: no code of the user's runs, and this thread has the GIL.
    bool run_usual(py::handle grads, bool nested, Preparation& prepared) {
#ifdef Py_GIL_DISABLED
        return false;
#endif
        const std::lock_guard<Optimizer> lock(*this);
        if (!one_job_) return false;
        call_.clear();
        if (!find_usual_groups(grads, nested, prepared)) return false;
        const Job job = usual_job();
        for (size_t g = 0; g < groups_.size(); ++g) usual_groups_[g].scalars = usual_scalars(prepared, g);
        if (!find_usual_gradients(job)) return false;
        if (cpu::is_long(job.bytes())) hold_usual_gradients(prepared);
        call_.run(job);
        count_usual_step();
        return true;
    }

    // The same of tensors of PyTorch, whose gradients have been found.
    bool run_usual_tensors(const Preparation& prepared, bool& versions_raised) {
        if (!one_job_) return false;
        call_.clear();
        for (size_t g = 0; g < groups_.size(); ++g) {
            const Group<Hyper>& group = groups_[g];
            const void* const scalars = usual_scalars(prepared, g);
            for (int64_t i = group.first; i < group.first + group.count; ++i) {
                if (prepared.memory[i] == nullptr || steps_[i] != group.latest) return false;
                tensors_[i].streams[gradient_stream] = prepared.memory[i];
                tensors_[i].scalars = scalars;
            }
        }
        call_.run(usual_job(), [&] {
            count_usual_step();
            for (size_t i = 0; i < steps_.size(); ++i) write_count(i);
            versions_raised = raise_versions();
        });
        return true;
    }

    // Of all tensors. False where that is left to the caller.
    bool raise_versions() {
        if (raise_versions_.is_none()) return false;
        // No finalizer may touch what other threads are stepping.
        const bool collects = PyGC_Disable() != 0;
        PyObject* const raised = PyObject_CallOneArg(raise_versions_.ptr(), versioned_.ptr());
        if (collects) PyGC_Enable();
        if (raised == nullptr) PyErr_Clear();  // it will say so again
        Py_XDECREF(raised);
        return raised != nullptr;
    }

    Job usual_job() const {
        const Watch& first = watches_[0];
        return {first.rule, first.dtype, tensors_.data(), ends_.data(), static_cast<int64_t>(ends_.size()), false};
    }

    const void* usual_scalars(const Preparation& prepared, size_t g) {
        call_.next_hyper();
        return call_.scalars_of(prepared.groups[g].hyper, groups_[g].latest + 1, watches_[0].dtype);
    }

    void count_usual_step() {
        for (Group<Hyper>& group : groups_) {
            ++group.latest;
            std::fill_n(steps_.begin() + group.first, group.count, group.latest);
        }
    }

    bool find_usual_groups(py::handle& grads, bool nested, const Preparation& prepared) {
        if (prepared.groups.size() != groups_.size()) return false;
        if (nested && (!is_list(grads) || length(grads) != static_cast<int64_t>(groups_.size()))) return false;
        usual_groups_.clear();
        for (size_t g = 0; g < groups_.size(); ++g) {
            const Group<Hyper>& group = groups_[g];
            const py::handle params = prepared.groups[g].params;
            PyObject* const* gradients = nested ? PySequence_Fast_ITEMS(grads.ptr()) + g : &grads.ptr();
            if (group.structure == Structure::list) {
                if (!is_list(*gradients) || length(*gradients) != group.count) return false;
                gradients = PySequence_Fast_ITEMS(*gradients);
            }
            if (group.structure == Structure::dict || !params || !PyList_Check(params.ptr()) ||
                length(params) != group.count)
                return false;
            usual_groups_.push_back({PySequence_Fast_ITEMS(params.ptr()), gradients, nullptr});
        }
        return true;
    }

    // With many small arrays this takes a third of the step, so that the threads share it as they will share the step.
    bool find_usual_gradients(const Job& job) {
        if (job.count < least_shared_checks || job.elements() < job.count) return find_usual_gradients(0, job.count);
        std::atomic<bool> found{true};
        cpu::parallel_for(job.elements(), job.bytes(), [&](int64_t from, int64_t to) {
            if (!find_usual_gradients(job.count * from / job.elements(), job.count * to / job.elements()))
                found.store(false, std::memory_order_relaxed);
        });
        return found;
    }

    bool find_usual_gradients(int64_t begin, int64_t end) {
        for (size_t g = 0; g < groups_.size(); ++g) {
            const Group<Hyper>& group = groups_[g];
            const UsualGroup& usual = usual_groups_[g];
            PyObject* const* const gradients = usual.gradients;
            const int64_t first = group.first, past = std::min(end, first + group.count);
            for (int64_t i = std::max(begin, first); i < past; ++i) {
                prefetch_after(i, past, [&](int64_t k) { return gradients[k - first]; });
                PyObject* const gradient = gradients[i - first];
                if (usual.params[i - first] != watches_[i].array || steps_[i] != group.latest ||
                    !is_as_before(watches_[i], gradient))
                    return false;
                tensors_[i].streams[gradient_stream] = py::detail::array_proxy(gradient)->data;
                tensors_[i].scalars = usual.scalars;
            }
        }
        return true;
    }

    // What the checks of the parameters after parameter i look at.
    template <class GradientOf>
    void prefetch_after(int64_t i, int64_t end, const GradientOf& gradient_of) const {
        if (i + 16 < end) {
            prefetch_object(watches_[i + 16].array);
            prefetch_object(gradient_of(i + 16));
        }
        if (i + 8 < end && watches_[i + 8].usual) prefetch_shapes(watches_[i + 8].array, gradient_of(i + 8));
    }

    void hold_usual_gradients(Preparation& prepared) const {
        for (size_t g = 0; g < groups_.size(); ++g) {
            for (int64_t i = 0; i < groups_[g].count; ++i)
                prepared.gradients.push_back(py::reinterpret_borrow<py::object>(usual_groups_[g].gradients[i]));
        }
    }

    // What a loss scaler has left on the GPU: arrays or None, or null.
    struct ScalingArrays {
        py::object scale, found_inf;
    };

    StepOutcome run(const Preparation& prepared, GradientOptions options, const ScalingArrays& scaling) {
        call_.clear();
        for (size_t g = 0; g < prepared.groups.size(); ++g) {
            call_.next_hyper();
            const Group<Hyper>& group = groups_[g];
            const int64_t end = group.first + group.count;
            for (int64_t i = group.first; i < end; ++i) {
                if (prepared.memory.empty())
                    prefetch_after(i, end, [&](int64_t k) { return prepared.gradients[k].ptr(); });
                if (!prepared.gradients[i].is_none()) {
                    if (!prepared.memory.empty() && prepared.memory[i] != nullptr) {
                        add_contiguous_gradient(i, prepared.memory[i], scalars_for(i, prepared.groups[g].hyper, group));
                    } else {
                        add_gradient(i, prepared.gradients[i], prepared.groups[g].hyper, group);
                    }
                    if (options.needs_norm()) call_.order.push_back({watches_[i].rule, watches_[i].dtype});
                }
            }
            if (group.state != nullptr && gradients_of(group, prepared) > 0) add_group_on_gpu(group, prepared, g);
        }
        add_loss_scaling(scaling, options);
        if (options.zero_grad) check_zeroed_gradients(prepared.gradients);
        const StepOutcome outcome = call_.run(options);
        if (outcome.skipped) return outcome;
        for (size_t g = 0; g < prepared.groups.size(); ++g) {
            Group<Hyper>& group = groups_[g];
            for (int64_t i = group.first; i < group.first + group.count; ++i) {
                if (prepared.gradients[i].is_none()) continue;
                group.latest = std::max(group.latest, ++steps_[i]);
                if (!counts_.empty()) write_count(i);
            }
        }
        return outcome;
    }

    // Whether a GPU has skipped a step is known there alone, and so is the number of the next.
    void check_skipping() {
        const std::lock_guard<Optimizer> lock(*this);
        for (const Group<Hyper>& group : groups_) {
            if (group.state == nullptr && parameters_[group.first].view.device != ArrayView::host)
                throw py::value_error(
                    "skip_nonfinite: on a GPU, which alone knows whether a step was skipped, the steps have to be "
                    "counted there as well; make the optimizer with capturable=True");
        }
    }

    // Prepares the parameters from `first` on for steps that are counted on the GPU, and returns where.
    GroupState<Hyper>* on_gpu(const py::object& group_state, size_t first) {
        if (group_state.is_none()) return nullptr;
        const ArrayView view = view_array(group_state, {"the group's state"}, call_.gpu_arrays);
        auto* const state = reinterpret_cast<GroupState<Hyper>*>(view.data);
        const GpuBackend& gpu = call_.gpu_arrays.backend();
        for (size_t i = first; i < parameters_.size(); ++i) {
            Parameter& parameter = parameters_[i];
            const DType compute = compute_type(parameter.view.dtype);
            gpu.load(parameter.rule, compute, false, view.device);
            // A gradient may be narrow where its parameter is not.
            if (compute == DType::float32) gpu.load(parameter.rule, compute, true, view.device);
            parameter.storage.random_on_gpu = &state->random;
        }
        gpu.load_norm(view.device);
        return state;
    }

    static bool is_lr_on_gpu(py::handle dict) {
        PyObject* const lr = PyDict_GetItemWithError(dict.ptr(), keys().lr.ptr());
        return lr != nullptr && !PyFloat_CheckExact(lr) && !PyLong_CheckExact(lr) &&
               (is_cupy_array(lr) || py::hasattr(lr, "__cuda_array_interface__"));
    }

    void add_group_on_gpu(const Group<Hyper>& group, const Preparation& prepared, size_t g) {
        GroupOnGpu<Hyper> on_gpu{group.state, nullptr, DType::float64, prepared.groups[g].hyper, seed_, nullptr};
        on_gpu.counts = group.counts;
        on_gpu.parameters = group.count;
        if (prepared.groups[g].source.lr_on_gpu) {
            const std::string& prefix = prepared.groups[g].source.prefix;
            const py::object lr = prepared.groups[g].dict[keys().lr];
            const ArrayView view = view_array(lr, {"lr"}, call_.gpu_arrays);
            call_.placement.check(view, {"lr"});
            if (!view.is_of_compute_type())
                throw py::type_error(prefix + "lr: " + view.dtype_text() + "; a GPU array is to be float32 or float64");
            if (view.size() != 1)
                throw py::value_error(prefix + "lr: shape " + view.shape_text() +
                                      "; a GPU array is to have one element");
            if (!view.aligned()) throw py::value_error(prefix + "lr: not aligned to its size; pass a copy");
            on_gpu.lr = view.data;
            on_gpu.lr_dtype = view.dtype;
        }
        call_.template groups<Hyper>().push_back(on_gpu);
    }

    // The first group to begin its step finds out what follows from it, for all of them.
    void add_loss_scaling(const ScalingArrays& scaling, GradientOptions& options) {
        auto& groups = call_.template groups<Hyper>();
        if (groups.empty()) return;
        LossScaling& own = groups.front().loss_scaling;
        own.scale = scaling_memory(scaling.scale, "grad_scale");
        own.found_inf = scaling_memory(scaling.found_inf, "found_inf");
        if (own.any()) options.norm_outcome = &groups.front().state->outcome;
    }

    const float* scaling_memory(const py::object& array, const char* role) {
        if (!array || array.is_none()) return nullptr;
        const ArrayName name{role};
        const ArrayView view = view_array(array, name, call_.gpu_arrays);
        call_.placement.check(view, name);
        if (!view.known_dtype || view.dtype != DType::float32 || view.size() != 1)
            throw py::value_error(name.text() + ": " + view.dtype_text() + " of shape " + view.shape_text() +
                                  "; expected one float32");
        return reinterpret_cast<const float*>(view.data);
    }

    void check_all_have_gradients(const Group<Hyper>& group, const Preparation& prepared) const {
        for (int64_t i = group.first; i < group.first + group.count; ++i) {
            if (prepared.gradients[i].is_none())
                throw py::value_error(ArrayName{"grads", -1, &parameters_[i].suffix}.text() +
                                      ": None, but capturable=True counts the steps of a whole group on the GPU, so "
                                      "each of its parameters needs a gradient");
        }
    }

    static void hold_dicts(py::handle param_groups, Preparation& prepared) {
        const size_t count = prepared.groups.size();
        if (!PyList_Check(param_groups.ptr()) ||
            PyList_GET_SIZE(param_groups.ptr()) != static_cast<py::ssize_t>(count)) {
            throw py::value_error("param_groups: expected a list of " + std::to_string(count) +
                                  " groups; use add_param_group to add one");
        }
        for (size_t g = 0; g < count; ++g) {
            prepared.groups[g].dict = item_of(param_groups, g);
            const py::handle dict = prepared.groups[g].dict;
            if (!PyDict_Check(dict.ptr())) {
                throw py::type_error("param_groups[" + std::to_string(g) + "]: expected a dict, got " +
                                     Py_TYPE(dict.ptr())->tp_name);
            }
        }
    }

    void read_group(PreparedGroup& prepared, const Group<Hyper>& group, double scale) const {
        HyperSource& source = prepared.source;
        if (group.state != nullptr) {
            source.step = 0;
            source.lr_on_gpu = is_lr_on_gpu(prepared.dict);
        }
        prepared.hyper = Family<Hyper>::read(prepared.dict, parameters_[group.first].rule, source, decoupled_);
        prepared.hyper.grad_scale = scale;
        check_hyper(prepared.hyper, source);
    }

    void gather(py::handle grads, bool nested, Preparation& prepared) const {
        const size_t count = prepared.groups.size();
        if (nested && !is_list(grads)) {
            throw py::type_error("grads: expected a list with one entry for each parameter group, got " +
                                 std::string(Py_TYPE(grads.ptr())->tp_name));
        }
        if (nested && length(grads) != static_cast<int64_t>(count)) {
            throw py::value_error("grads: " + std::to_string(length(grads)) + " entries, but there are " +
                                  std::to_string(count) + " parameter groups");
        }
        for (size_t g = 0; g < count; ++g) {
            check_same_params(prepared.groups[g].params.ptr(), groups_[g], g);
            if (nested) {
                gather_group(groups_[g], item_of(grads, g), ("grads[" + std::to_string(g) + "]").c_str(),
                             prepared.gradients);
            } else {
                gather_group(groups_[g], grads, "grads", prepared.gradients);
            }
        }
    }

    // A step updates the arrays that the optimizer was made with; exchanging one in the dict must not go unseen.
    static void check_same_params(PyObject* params, const Group<Hyper>& group, size_t g) {
        bool same = params != nullptr && PyList_Check(params) && PyList_GET_SIZE(params) == group.count;
        for (int64_t i = 0; same && i < group.count; ++i) same = PyList_GET_ITEM(params, i) == group.arrays[i];
        if (!same) {
            throw py::value_error("param_groups[" + std::to_string(g) +
                                  "]['params']: not the arrays that the optimizer was made with; make a new optimizer "
                                  "and load this one's state_dict()");
        }
    }

    void gather_group(const Group<Hyper>& group, py::handle grads, const char* where,
                      std::vector<py::object>& gathered) const {
        if (group.structure == Structure::array) {
            gathered.push_back(py::reinterpret_borrow<py::object>(grads));
        } else if (group.structure == Structure::list) {
            if (!is_list(grads)) {
                throw py::type_error(std::string(where) + ": expected a list of arrays, as the parameters are, got " +
                                     Py_TYPE(grads.ptr())->tp_name);
            }
            if (length(grads) != group.count) {
                throw py::value_error(std::string(where) + ": " + std::to_string(length(grads)) +
                                      " arrays, but there are " + std::to_string(group.count) + " parameters");
            }
            for (int64_t i = 0; i < group.count; ++i) gathered.push_back(item_of(grads, i));
        } else {
            gather_dict(group, grads, where, gathered);
        }
    }

    void gather_dict(const Group<Hyper>& group, py::handle grads, const char* where,
                     std::vector<py::object>& gathered) const {
        if (!PyDict_Check(grads.ptr())) {
            throw py::type_error(std::string(where) +
                                 ": expected a dict of arrays by name, as the parameters are, got " +
                                 Py_TYPE(grads.ptr())->tp_name);
        }
        for (int64_t i = group.first; i < group.first + group.count; ++i) {
            const py::object& key = parameters_[i].key;
            PyObject* const gradient = PyDict_GetItemWithError(grads.ptr(), key.ptr());
            if (gradient == nullptr) {
                if (PyErr_Occurred()) throw py::error_already_set();
                throw py::value_error(std::string(where) + ": no gradient for parameter " + std::string(py::repr(key)) +
                                      "; give None to leave it as it is");
            }
            gathered.push_back(py::reinterpret_borrow<py::object>(gradient));
        }
        if (PyDict_Size(grads.ptr()) == group.count) return;
        for (const auto& item : py::reinterpret_borrow<py::dict>(grads)) {
            const auto name = py::reinterpret_borrow<py::object>(item.first);  // a comparison may empty the dict
            bool known = false;
            for (int64_t i = group.first; i < group.first + group.count && !known; ++i) {
                known = name.equal(parameters_[i].key);
            }
            if (!known) {
                throw py::value_error(std::string(where) + ": " + std::string(py::repr(name)) + " is not a parameter");
            }
        }
    }

    void add_gradient(int64_t i, py::handle gradient, const Hyper& hyper, const Group<Hyper>& group) {
        const Watch& watch = watches_[i];
        const void* const scalars = scalars_for(i, hyper, group);
        if (is_as_before(watch, gradient)) {
            add_contiguous_gradient(i, py::detail::array_proxy(gradient.ptr())->data, scalars);
        } else if (void* const data = cupy_gradient_as_before(i, gradient); data != nullptr) {
            add_contiguous_gradient(i, data, scalars);
        } else {
            call_.add(watch.rule, watch.dtype, checked_tensor(i, gradient)).scalars = scalars;
        }
    }

    // And prepares what the step of this parameter rounds at random.
    const void* scalars_for(int64_t i, const Hyper& hyper, const Group<Hyper>& group) {
        if (tensors_[i].storage != nullptr) parameters_[i].storage.random = random_stream(seed_, steps_[i] + 1);
        return group.state == nullptr ? call_.scalars_of(hyper, steps_[i] + 1, watches_[i].dtype)
                                      : scalars_on_gpu(group, hyper, watches_[i].dtype);
    }

    void add_contiguous_gradient(int64_t i, void* data, const void* scalars) {
        Tensor& tensor = call_.add(watches_[i].rule, watches_[i].dtype, tensors_[i]);
        tensor.streams[1] = data;
        tensor.scalars = scalars;
    }

    // The number of the step is not known here. The first has the largest scalars; they are computed to be checked.
    const void* scalars_on_gpu(const Group<Hyper>& group, const Hyper& hyper, DType dtype) {
        call_.scalars_of(hyper, 1, dtype);
        if (dtype == DType::float32) return &group.state->float32;
        return &group.state->float64;
    }

    const bool decoupled_;
    std::mutex mutex_;
    std::atomic<std::thread::id> owner_{};
    // A deque, so that what a step has a reference to stays where it is when a group is added.
    std::deque<Group<Hyper>> groups_;

    // Of tensors of PyTorch; the counts are those of the parameters.
    std::vector<WatchedGroup> watched_groups_;
    std::vector<WatchedEntry> watched_state_;
    uint64_t state_version_ = 0;  // when it was compared
    py::list versioned_;          // of each parameter, what has the version counter of its tensor
    py::object raise_versions_;
    std::vector<Count> counts_;
    py::list group_counts_;  // which keeps them
    py::object as_array_;
    TorchReader tensor_reader_;

    // Of a step, kept for their memory.
    Preparation spare_;
    std::vector<UsualGroup> usual_groups_;
};

// What cast<Native&>() gives, without its search for the type: of a method, self is known to have it.
template <class Native>
Native& native_of(py::handle self) {
    auto* const native =
        reinterpret_cast<py::detail::instance*>(self.ptr())->get_value_and_holder().template value_ptr<Native>();
    if (native == nullptr) throw py::type_error("the optimizer's __init__ was not called");
    return *native;
}

template <class Hyper>
void step(py::handle self, py::handle param_groups, py::handle grads, py::handle grad_scale, py::handle nested) {
    GradientOptions options;
    options.grad_scale = read_number(grad_scale, "grad_scale", {});
    native_of<Optimizer<Hyper>>(self).step(param_groups, grads, options, nested.ptr() == Py_True);
}

// Returns the norm, or None, and whether the step was skipped; None where a GPU will know. `gpu_norm` is None or what
// place_norm takes.
template <class Hyper>
py::object step_with_options(py::handle self, py::handle param_groups, py::handle grads, py::handle grad_scale,
                             py::handle clip_norm, py::handle skip_nonfinite, py::handle zero_grad, py::handle nested,
                             py::handle gpu_norm) {
    Optimizer<Hyper>& optimizer = native_of<Optimizer<Hyper>>(self);
    GradientOptions options;
    options.grad_scale = read_number(grad_scale, "grad_scale", {});
    if (!clip_norm.is_none()) options.clip_norm = read_clip_norm(clip_norm);
    options.skip_nonfinite = read_flag(skip_nonfinite, "skip_nonfinite", {});
    options.zero_grad = read_flag(zero_grad, "zero_grad", {});
    if (options.needs_norm() && !gpu_norm.is_none()) {
        const auto arrays = py::reinterpret_borrow<py::tuple>(gpu_norm);
        optimizer.place_norm(arrays[0], arrays[1], options);
    }
    const StepOutcome outcome = optimizer.step(param_groups, grads, options, nested.ptr() == Py_True);
    if (outcome.on_gpu) return py::none();
    return py::make_tuple(outcome.grad_norm, outcome.skipped);
}

template <class Hyper>
void bind_family(py::module_& module, const char* name) {
    using Native = Optimizer<Hyper>;
    py::class_<Native> native(module, name);
    native.def(py::init<bool, uint64_t>(), py::arg("decoupled") = false, py::arg("seed") = 0)
        .def("add_group", &Native::add_group)
        .def("check_group", &Native::check_group)
        .def("reads_tensor", &Native::reads_tensor)
        .def("watch_tensors", &Native::watch_tensors)
        .def("step_tensors", &Native::step_tensors)
        .def_readonly_static("group_state_bytes", &Native::group_state_bytes)
        .def_property_readonly("norm_workspace_bytes", &Native::norm_workspace_bytes)
        .def_property("steps", &Native::steps, &Native::set_steps);
    def_fast_method<&step<Hyper>>(native, "step");
    def_fast_method<&step_with_options<Hyper>>(native, "step_with_options");
}

}  // namespace

void bind_optimizer(py::module_& module) {
    // Before there is any state for it.
    module.def("check_parameter", [](py::handle param, const std::string& suffix) {
        const ArrayName name{"params", -1, &suffix};
        GpuArrays gpu_arrays;
        ParameterViews views;
        views.streams[0] = views.streams[1] = view_array(param, name, gpu_arrays);
        StepStores stores;
        bind(rule_index<Gd>, views, name, stores);
    });
    bind_family<GdHyper>(module, "GdOptimizer");
    bind_family<AdamHyper>(module, "AdamOptimizer");
}

}  // namespace fusedstep
