#include "group_reader.hpp"

namespace fusedstep {
namespace {

class GroupReader {
public:
    GroupReader(py::handle group, const HyperSource& source) : group_(group), source_(source) {}

    double number(py::handle key, const char* name) const { return read_number(item(key, name), name, source_); }
    double lr() const { return source_.lr_on_gpu ? 0.5 : number(keys().lr, "lr"); }
    bool flag(py::handle key, const char* name) const { return read_flag(item(key, name), name, source_); }
    bool flag_or(py::handle key, const char* name, bool otherwise) const {
        return PyDict_GetItemWithError(group_.ptr(), key.ptr()) == nullptr ? otherwise : flag(key, name);
    }
    void betas(AdamHyper& hyper) const { read_betas(item(keys().betas, "betas"), hyper.beta1, hyper.beta2, source_); }

private:
    py::object item(py::handle key, const char* name) const {
        PyObject* value = PyDict_GetItemWithError(group_.ptr(), key.ptr());
        if (value == nullptr) throw py::value_error(source_.prefix + name + ": missing");
        return py::reinterpret_borrow<py::object>(value);
    }

    py::handle group_;
    const HyperSource& source_;
};

}  // namespace

const Keys& keys() {
    static const Keys* const made = new Keys;  // never destroyed: Python may be gone by then
    return *made;
}

GdHyper Family<GdHyper>::read(py::handle group, int rule, const HyperSource& source, bool) {
    const GroupReader reader(group, source);
    GdHyper hyper;
    hyper.lr = reader.lr();
    hyper.momentum = reader.number(keys().momentum, "momentum");
    hyper.dampening = reader.number(keys().dampening, "dampening");
    hyper.weight_decay = reader.number(keys().weight_decay, "weight_decay");
    hyper.nesterov = reader.flag(keys().nesterov, "nesterov");
    hyper.maximize = reader.flag(keys().maximize, "maximize");
    if (rule == rule_index<Gd> && hyper.momentum != 0) {
        throw py::value_error(source.prefix +
                              "momentum: the optimizer was made without momentum, so it has no "
                              "buffers; make a new one");
    }
    return hyper;
}

AdamHyper Family<AdamHyper>::read(py::handle group, int rule, const HyperSource& source, bool decoupled) {
    const GroupReader reader(group, source);
    AdamHyper hyper;
    hyper.decoupled = decoupled;
    hyper.lr = reader.lr();
    reader.betas(hyper);
    hyper.eps = reader.number(keys().eps, "eps");
    hyper.weight_decay = reader.number(keys().weight_decay, "weight_decay");
    hyper.maximize = reader.flag(keys().maximize, "maximize");
    // PyTorch's groups have no bias_correction, and ours no decoupled_weight_decay.
    hyper.bias_correction = reader.flag_or(keys().bias_correction, "bias_correction", true);
    hyper.decoupled = reader.flag_or(keys().decoupled_weight_decay, "decoupled_weight_decay", hyper.decoupled);
    if (reader.flag(keys().amsgrad, "amsgrad") != (rule == rule_index<AmsGrad>)) {
        throw py::value_error(source.prefix + "amsgrad: cannot change after the optimizer was made; make a new one");
    }
    return hyper;
}

}  // namespace fusedstep
