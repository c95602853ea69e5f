#include "functions.hpp"

#include <array>
#include <atomic>
#include <memory>
#include <vector>

#include "fast_function.hpp"
#include "step_call.hpp"

namespace fusedstep {
namespace {

using Arguments = std::array<py::handle, max_streams>;

bool is_list(py::handle object) { return PyList_Check(object.ptr()) || PyTuple_Check(object.ptr()); }

// Once in a program: the functions keep nothing beside the parameters.
void warn_of_rounding(const ArrayName& name) {
    static std::atomic<bool> warned{false};
    if (warned.exchange(true)) return;
    const std::string text = name.text() +
                             ": a step smaller than the spacing of its 16-bit elements is lost; an optimizer keeps it "
                             "with master_weights='float32', 'correction16', 'correction8' or 'stochastic'";
    if (PyErr_WarnEx(PyExc_UserWarning, text.c_str(), 1) != 0) throw py::error_already_set();
}

template <class Hyper>
void add_parameter(StepCall& call, int rule, const Arguments& arrays, const Hyper& hyper, int64_t step, int64_t index) {
    const char* const* roles = stream_roles(rule);
    const RuleStreams streams = rule_streams[rule];
    ParameterViews views;
    for (int k = 0; k < streams.count; ++k) {
        views.streams[k] = view_array(arrays[k], {roles[k], index}, call.gpu_arrays);
        call.placement.check(views.streams[k], {roles[k], index});
    }
    Tensor tensor = bind(rule, views, {"", index}, call.stores);
    for (int k = 0; k < streams.count; ++k) {
        call.extents.push_back(extent_of(views.streams[k], (streams.written >> k & 1) != 0, {roles[k], index}));
    }
    const DType compute = compute_type(views.streams[0].dtype);
    if (compute != views.streams[0].dtype) warn_of_rounding({roles[0], index});
    tensor.scalars = call.scalars_of(hyper, step, compute);
    call.add(rule, compute, tensor);
}

// A list's arrays as a tuple of our own: another thread may change the list while the step runs.
py::tuple fixed(py::handle list) { return py::reinterpret_steal<py::tuple>(PySequence_Tuple(list.ptr())); }

std::array<py::tuple, max_streams> fixed_lists(int rule, const Arguments& lists) {
    const char* const* roles = stream_roles(rule);
    std::array<py::tuple, max_streams> tuples;
    for (int k = 0; k < rule_streams[rule].count; ++k) {
        if (!is_list(lists[k])) {
            throw py::type_error(std::string(roles[k]) + ": params is a list, so a list of arrays is expected, got " +
                                 Py_TYPE(lists[k].ptr())->tp_name);
        }
        tuples[k] = fixed(lists[k]);
        if (tuples[k].size() != tuples[0].size()) {
            throw py::value_error(std::string(roles[k]) + ": " + std::to_string(tuples[k].size()) +
                                  " arrays, but params has " + std::to_string(tuples[0].size()));
        }
    }
    return tuples;
}

template <class Hyper>
void add_list(StepCall& call, int rule, const std::array<py::tuple, max_streams>& lists, const Hyper& hyper,
              py::handle step) {
    const int64_t count = static_cast<int64_t>(lists[0].size());
    const bool own_steps = is_list(step);
    const py::tuple steps = own_steps ? fixed(step) : py::tuple();
    if (own_steps && static_cast<int64_t>(steps.size()) != count) {
        throw py::value_error("step: " + std::to_string(steps.size()) + " integers, but params has " +
                              std::to_string(count) + " arrays");
    }
    // All of them before the first array is looked at: an __index__ is code of the user's.
    std::vector<int64_t> numbers;
    for (int64_t i = 0; own_steps && i < count; ++i) {
        numbers.push_back(read_step(steps[i], "step[" + std::to_string(i) + "]"));
    }
    const int64_t shared = own_steps ? 0 : read_step(step, "step");
    for (int64_t i = 0; i < count; ++i) {
        const int64_t number = own_steps ? numbers[i] : shared;
        Arguments arrays{};
        for (int k = 0; k < rule_streams[rule].count; ++k) arrays[k] = PyTuple_GET_ITEM(lists[k].ptr(), i);
        add_parameter(call, rule, arrays, hyper, number, i);
    }
}

// A StepCall to use: this thread's own, or a fresh one inside a call that is being checked (a finaliser
// that Python runs there may step too).
class BorrowedCall {
public:
    BorrowedCall() : outer_(!in_use), fresh_(outer_ ? nullptr : new StepCall) {
        in_use = true;
        get().clear();
    }
    ~BorrowedCall() {
        if (outer_) in_use = false;
    }
    BorrowedCall(const BorrowedCall&) = delete;
    BorrowedCall& operator=(const BorrowedCall&) = delete;

    StepCall& get() {
        static thread_local StepCall own;
        return outer_ ? own : *fresh_;
    }

private:
    static thread_local bool in_use;
    bool outer_;
    std::unique_ptr<StepCall> fresh_;
};

thread_local bool BorrowedCall::in_use = false;

template <class Hyper>
void take_step(int rule, const Arguments& arguments, const Hyper& hyper, py::handle step) {
    check_hyper(hyper, {});
    BorrowedCall borrowed;
    StepCall& call = borrowed.get();
    std::array<py::tuple, max_streams> lists;
    if (is_list(arguments[0])) {
        lists = fixed_lists(rule, arguments);
        add_list(call, rule, lists, hyper, step);
    } else {
        add_parameter(call, rule, arguments, hyper, read_step(step, "step"), -1);
    }
    check_overlaps(call.extents);
    call.run();
}

void gd_step(py::handle params, py::handle grads, py::handle momentum_buffer, py::handle step_number, py::handle lr,
             py::handle momentum, py::handle dampening, py::handle nesterov, py::handle weight_decay,
             py::handle maximize, py::handle grad_scale) {
    GdHyper hyper;
    hyper.lr = read_number(lr, "lr", {});
    hyper.momentum = read_number(momentum, "momentum", {});
    hyper.dampening = read_number(dampening, "dampening", {});
    hyper.weight_decay = read_number(weight_decay, "weight_decay", {});
    hyper.grad_scale = read_number(grad_scale, "grad_scale", {});
    hyper.nesterov = read_flag(nesterov, "nesterov", {});
    hyper.maximize = read_flag(maximize, "maximize", {});
    if (momentum_buffer.is_none()) {
        check_hyper(hyper, {});
        if (hyper.momentum != 0) {
            throw py::value_error(
                "momentum_buffer: needed when momentum is not 0; pass an array (or a list of arrays) "
                "like params, and step");
        }
        take_step(rule_index<Gd>, {params, grads}, hyper,
                  step_number.is_none() ? py::handle(py::int_(1)) : step_number);
        return;
    }
    if (step_number.is_none()) {
        throw py::type_error("step: needed with a momentum_buffer (the first step is 1, and starts the buffer)");
    }
    take_step(rule_index<GdMomentum>, {params, grads, momentum_buffer}, hyper, step_number);
}

void adam_step(py::handle params, py::handle grads, py::handle exp_avg, py::handle exp_avg_sq,
               py::handle max_exp_avg_sq, py::handle step_number, py::handle lr, py::handle betas, py::handle eps,
               py::handle weight_decay, py::handle bias_correction, py::handle maximize, py::handle grad_scale,
               py::handle decoupled) {
    AdamHyper hyper;
    hyper.lr = read_number(lr, "lr", {});
    read_betas(betas, hyper.beta1, hyper.beta2, {});
    hyper.eps = read_number(eps, "eps", {});
    hyper.weight_decay = read_number(weight_decay, "weight_decay", {});
    hyper.grad_scale = read_number(grad_scale, "grad_scale", {});
    hyper.bias_correction = read_flag(bias_correction, "bias_correction", {});
    hyper.maximize = read_flag(maximize, "maximize", {});
    hyper.decoupled = read_flag(decoupled, "decoupled", {});
    if (max_exp_avg_sq.is_none()) {
        take_step(rule_index<Adam>, {params, grads, exp_avg, exp_avg_sq}, hyper, step_number);
    } else {
        take_step(rule_index<AmsGrad>, {params, grads, exp_avg, exp_avg_sq, max_exp_avg_sq}, hyper, step_number);
    }
}

}  // namespace

void bind_functions(py::module_& module) {
    def_fast<&gd_step>(module, "gd_step");
    def_fast<&adam_step>(module, "adam_step");
}

}  // namespace fusedstep
