// Functions that take only positional Python objects, called without pybind11's argument conversion: that
// costs 0.2 microseconds a call, a fifth of a small step. Exceptions become Python's as they do in pybind11. They
// return nothing or an object.
#pragma once

#include <pybind11/pybind11.h>

#include <type_traits>
#include <utility>

namespace fusedstep {

namespace py = pybind11;

template <auto function>
struct FastFunction;

template <class Result, class... Handles, Result (*function)(Handles...)>
struct FastFunction<function> {
    static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
        return guarded(given, sizeof...(Handles),
                       [&] { return spread(arguments, std::make_index_sequence<sizeof...(Handles)>()); });
    }

    // As a method, self is the first of them.
    static PyObject* call_method(PyObject* self, PyObject* const* arguments, Py_ssize_t given) {
        return guarded(given, sizeof...(Handles) - 1, [&] {
            return spread_after(self, arguments, std::make_index_sequence<sizeof...(Handles) - 1>());
        });
    }

private:
    template <class Call>
    static PyObject* guarded(Py_ssize_t given, Py_ssize_t expected, const Call& call) {
        if (given != expected) {
            PyErr_Format(PyExc_TypeError, "%zd positional arguments expected, got %zd", expected, given);
            return nullptr;
        }
        try {
            if constexpr (std::is_void_v<Result>) {
                call();
                Py_RETURN_NONE;
            } else {
                return call().release().ptr();
            }
        } catch (...) {
            py::detail::try_translate_exceptions();
            return nullptr;
        }
    }

    template <size_t... i>
    static Result spread(PyObject* const* arguments, std::index_sequence<i...>) {
        return function(py::handle(arguments[i])...);
    }

    template <size_t... i>
    static Result spread_after(PyObject* self, PyObject* const* arguments, std::index_sequence<i...>) {
        return function(py::handle(self), py::handle(arguments[i])...);
    }
};

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

inline PyMethodDef fast_definition(const char* name, FastCall call) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)), METH_FASTCALL, nullptr};
}

template <auto function>
void def_fast(py::module_& module, const char* name) {
    static PyMethodDef definition = fast_definition(name, &FastFunction<function>::call);
    const py::object owner = module.attr("__name__");
    module.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&definition, nullptr, owner.ptr()));
}

template <auto function>
void def_fast_method(py::handle type, const char* name) {
    static PyMethodDef definition = fast_definition(name, &FastFunction<function>::call_method);
    type.attr(name) =
        py::reinterpret_steal<py::object>(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &definition));
}

}  // namespace fusedstep
