#include "hyper_reader.hpp"

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>

namespace fusedstep {
namespace {

std::string shown(double value) { return py::str(py::float_(value)); }

std::string type_name(py::handle value) { return Py_TYPE(value.ptr())->tp_name; }

void check_range(double value, bool in_range, const char* name, const char* range, const HyperSource& source) {
    // NaN fails every comparison, so it fails here too.
    if (in_range && std::isfinite(value)) return;
    throw py::value_error(source.prefix + name + ": expected a finite number " + range + ", got " + shown(value));
}

void check_at_least_zero(double value, const char* name, const HyperSource& source) {
    check_range(value, value >= 0, name, ">= 0", source);
}

void check_grad_scale(double value, const HyperSource& source) {
    check_range(value, value > 0, "grad_scale", "> 0", source);
}

struct Named {
    const char* name;
    double value;
};

void check_fits_float32(std::initializer_list<Named> values) {
    for (const Named& named : values) {
        if (!std::isfinite(static_cast<float>(named.value))) {
            throw py::value_error(std::string(named.name) + ": " + shown(named.value) +
                                  " is too large for float32 parameters");
        }
    }
}

}  // namespace

double read_number(py::handle value, const char* name, const HyperSource& source) {
    if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
    if (source.step > 0 && PyCallable_Check(value.ptr())) {
        if (!source.call_schedules) return std::strcmp(name, "dampening") == 0 ? 0.0 : 0.5;
        HyperSource result = source;
        result.step = 0;
        return read_number(value(source.step), name, result);
    }
    const double number = PyFloat_AsDouble(value.ptr());
    if (number == -1.0 && PyErr_Occurred()) {
        const bool too_large = PyErr_ExceptionMatches(PyExc_OverflowError);
        PyErr_Clear();
        if (too_large) throw py::value_error(source.prefix + name + ": too large for a float");
        throw py::type_error(source.prefix + name + ": expected a number" + (source.step > 0 ? " or a callable" : "") +
                             ", got " + type_name(value));
    }
    return number;
}

bool read_flag(py::handle value, const char* name, const HyperSource& source) {
    if (value.ptr() == Py_True) return true;
    if (value.ptr() == Py_False) return false;
    if (type_name(value).rfind("numpy.bool", 0) == 0) return PyObject_IsTrue(value.ptr()) == 1;
    throw py::type_error(source.prefix + name + ": expected True or False, got " + type_name(value));
}

void read_betas(py::handle value, double& beta1, double& beta2, const HyperSource& group) {
    const HyperSource source{group.prefix};  // no schedules
    if (PyTuple_CheckExact(value.ptr()) && PyTuple_GET_SIZE(value.ptr()) == 2) {
        beta1 = read_number(PyTuple_GET_ITEM(value.ptr(), 0), "betas[0]", source);
        beta2 = read_number(PyTuple_GET_ITEM(value.ptr(), 1), "betas[1]", source);
        return;
    }
    if (!py::isinstance<py::sequence>(value) || py::isinstance<py::str>(value) || py::len(value) != 2) {
        throw py::type_error(source.prefix + "betas: expected a pair of numbers, got " + std::string(py::repr(value)));
    }
    const auto pair = py::reinterpret_borrow<py::sequence>(value);
    beta1 = read_number(py::object(pair[0]), "betas[0]", source);
    beta2 = read_number(py::object(pair[1]), "betas[1]", source);
}

int64_t read_step(py::handle value, const std::string& name) {
    const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!index) {
        PyErr_Clear();
        throw py::type_error(name + ": expected an integer >= 1, got " + type_name(value));
    }
    int overflow = 0;
    const int64_t step = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow != 0 || step < 1) {
        throw py::value_error(name + ": expected an integer >= 1 (the first step is 1), got " +
                              std::string(py::str(index)));
    }
    return step;
}

double read_clip_norm(py::handle value) {
    const double number = read_number(value, "clip_norm", {});
    check_range(number, number > 0, "clip_norm", "> 0", {});
    return number;
}

void check_hyper(const GdHyper& hyper, const HyperSource& source) {
    check_at_least_zero(hyper.lr, "lr", source);
    check_at_least_zero(hyper.momentum, "momentum", source);
    check_range(hyper.dampening, true, "dampening", "", source);
    check_at_least_zero(hyper.weight_decay, "weight_decay", source);
    check_grad_scale(hyper.grad_scale, source);
    if (hyper.nesterov && (hyper.momentum == 0 || hyper.dampening != 0)) {
        throw py::value_error(source.prefix + "nesterov: needs a momentum above 0 and a dampening of 0");
    }
}

void check_hyper(const AdamHyper& hyper, const HyperSource& source) {
    check_at_least_zero(hyper.lr, "lr", source);
    check_range(hyper.beta1, hyper.beta1 >= 0 && hyper.beta1 < 1, "betas[0]", "in [0, 1)", source);
    check_range(hyper.beta2, hyper.beta2 >= 0 && hyper.beta2 < 1, "betas[1]", "in [0, 1)", source);
    check_at_least_zero(hyper.eps, "eps", source);
    check_at_least_zero(hyper.weight_decay, "weight_decay", source);
    check_grad_scale(hyper.grad_scale, source);
}

void check_scalars(const GdHyper& hyper, const GdScalars<float>&) {
    check_fits_float32({{"lr", hyper.lr},
                        {"momentum", hyper.momentum},
                        {"dampening", 1 - hyper.dampening},
                        {"weight_decay", hyper.weight_decay},
                        {"grad_scale", hyper.grad_scale}});
}

void check_scalars(const AdamHyper& hyper, const AdamScalars<float>& scalars) {
    check_fits_float32(
        {{"lr", hyper.lr}, {"eps", hyper.eps}, {"weight_decay", hyper.weight_decay}, {"grad_scale", hyper.grad_scale}});
    if (!std::isfinite(scalars.neg_step_size)) {
        throw py::value_error("lr: lr / (1 - beta1 ** step) is too large for float32 parameters");
    }
    if (!std::isfinite(scalars.param_decay)) {
        throw py::value_error("weight_decay: lr * weight_decay is too large for float32 parameters");
    }
}

void check_scalars(const AdamHyper&, const AdamScalars<double>& scalars) {
    if (!std::isfinite(scalars.neg_step_size)) {
        throw py::value_error("lr: lr / (1 - beta1 ** step) is too large for float64 parameters");
    }
    if (!std::isfinite(scalars.param_decay)) {
        throw py::value_error("weight_decay: lr * weight_decay is too large for float64 parameters");
    }
}

}  // namespace fusedstep
