// The hyper-parameters of a group, read from its dict.
#pragma once

#include <pybind11/pybind11.h>

#include "../rules/table.hpp"
#include "hyper_reader.hpp"

namespace fusedstep {

struct Keys {
    py::object lr = interned("lr"), momentum = interned("momentum"), dampening = interned("dampening"),
               nesterov = interned("nesterov"), betas = interned("betas"), eps = interned("eps"),
               weight_decay = interned("weight_decay"), maximize = interned("maximize"),
               bias_correction = interned("bias_correction"), amsgrad = interned("amsgrad"),
               params = interned("params"), decoupled_weight_decay = interned("decoupled_weight_decay");

    // As the keys of a dict written in a program are: looked up without comparing characters.
    static py::object interned(const char* key) {
        return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(key));
    }
};

const Keys& keys();

template <class Hyper>
struct Family;

template <>
struct Family<GdHyper> {
    static int rule(size_t state_arrays) { return state_arrays == 0 ? rule_index<Gd> : rule_index<GdMomentum>; }

    static GdHyper read(py::handle group, int rule, const HyperSource& source, bool decoupled = false);
};

template <>
struct Family<AdamHyper> {
    static int rule(size_t state_arrays) { return state_arrays == 2 ? rule_index<Adam> : rule_index<AmsGrad>; }

    static AdamHyper read(py::handle group, int rule, const HyperSource& source, bool decoupled = false);
};

}  // namespace fusedstep
