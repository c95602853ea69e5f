// The parameters of an optimizer: their arrays and state, checked once, and the gradients of a step, of which only what
// can have changed is checked again.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "step_call.hpp"

namespace fusedstep {

struct Parameter {
    py::object object;
    py::object cupy_dtype;  // of a CuPy array; else null
    std::vector<py::object> state;
    py::object extras[max_streams];  // what is beside each stream, or null
    bool stochastic;                 // how the parameter is rounded
    Storage storage;                 // where the streams are not all native, and the gradient is as the parameter
    py::object key;                  // of the gradient, in a group given as a dict
    std::string suffix;              // "[3]", "['w2']": how errors name it
    int rule;
    size_t group;

    // The array as it was when it was checked.
    ArrayView view;
    std::vector<py::ssize_t> shape, strides;
    bool c_contiguous = true, f_contiguous = true;
};

// What the usual step compares, in one cache line: with a thousand small arrays, fetching this is half of it.
struct alignas(64) Watch {
    PyObject* array;
    const char* data;
    PyObject* descriptor;
    int64_t bytes;
    int flags;
    int8_t dimensions;
    int8_t rule;
    DType dtype;
    bool usual;    // a NumPy array, C-contiguous as its state is
    size_t shape;  // its place in shapes_

    // The memory around the last gradient that no array of ours lies in.
    const char* gap_begin = nullptr;
    const char* gap_end = nullptr;
};
static_assert(sizeof(Watch) == 64);

class ParameterList {
protected:
    explicit ParameterList(uint64_t seed) : seed_(seed) {}

    // state[k][i] is state array k of parameter i, and extras[k][i] what lies beside its stream k.
    void add_parameter(const py::list& params, const py::list& keys, const py::list& state, const py::list& suffixes,
                       const py::list& extras, bool stochastic, size_t i, int rule, size_t group);

    // Takes back the parameters from `count` on.
    void shorten(size_t count);

    // Finds everything that a step may write, which must all be in one place and share no memory.
    void find_owned();

    // The step's tensor of a parameter and a gradient that is not as it was.
    Tensor checked_tensor(int64_t i, py::handle object);

    // A gradient may share memory with another gradient, but not with what a step writes.
    void check_gradient_memory(Watch& watch, const ArrayView& gradient, const ArrayName& name);

    // That they share no memory with a parameter or its state has been seen; nor may they with each other.
    void check_zeroed_gradients(const std::vector<py::object>& gradients);

    static bool unchanged(const Parameter& parameter, const ArrayView& p);

    // The usual case, quickly, by looking at memory alone: the parameter is as it was when it was checked, the gradient
    // is a C-contiguous array like it, and lies where it was seen to be in nobody's way. Everything else is
    // checked_tensor's.
    bool is_as_before(const Watch& watch, py::handle gradient) const {
        if (!watch.usual || Py_TYPE(gradient.ptr()) != Py_TYPE(watch.array)) return false;
        const auto* g = py::detail::array_proxy(gradient.ptr());
        const auto* p = py::detail::array_proxy(watch.array);
        constexpr int needed = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
        if ((g->flags & needed) != needed || g->descr != watch.descriptor || g->nd != watch.dimensions) return false;
        if (p->data != watch.data || p->flags != watch.flags || p->descr != watch.descriptor ||
            p->nd != watch.dimensions) {
            return false;
        }
        const py::ssize_t* const shape = shapes_.data() + watch.shape;
        for (int d = 0; d < p->nd; ++d) {
            if (g->dimensions[d] != shape[d] || p->dimensions[d] != shape[d]) return false;
        }
        return g->data >= watch.gap_begin && g->data + watch.bytes <= watch.gap_end;
    }

    // The same for CuPy arrays, or null. They keep their memory and type for life, and setting a shape keeps the
    // order of the elements, so the parameter needs no second look. The first array of a call does not come here:
    // it says which stream is current.
    void* cupy_gradient_as_before(int64_t i, py::handle gradient) const {
        const Parameter& parameter = parameters_[i];
        if (!parameter.cupy_dtype || !parameter.c_contiguous || call_.placement.device() != parameter.view.device)
            return nullptr;
        char* const data =
            cupy_reader_->contiguous_memory(gradient, parameter.cupy_dtype, parameter.shape, parameter.view.device);
        const bool free = data >= watches_[i].gap_begin && data + watches_[i].bytes <= watches_[i].gap_end;
        return data != nullptr && free ? data : nullptr;
    }

    const uint64_t seed_;
    std::deque<Parameter> parameters_;  // what a step has a reference to stays where it is when a group is added

    // Of each parameter, each in one run of memory for the usual step. The gradient's place in a tensor is to be
    // filled in, and is all that is missing when the gradient is contiguous in the same order as the other arrays.
    std::vector<Watch> watches_;
    std::vector<Tensor> tensors_;
    std::vector<int64_t> ends_;  // the number of elements in tensors 0 to i
    std::vector<int64_t> steps_;
    std::vector<py::ssize_t> shapes_;
    std::vector<Extent> owned_;  // all that a step may write, by address
    bool owned_dense_ = true;
    bool one_job_ = false;  // tensors_ are one: of one rule and type, native, NumPy's and C-contiguous
    std::unique_ptr<const CupyReader> cupy_reader_;

    // Of the step in progress; kept for its memory.
    StepCall call_;

private:
    Watch watch_of(const Parameter& parameter, const Tensor& tensor) const;

    // The arrays of a parameter in the order of its rule's streams.
    ParameterViews views_of(const Parameter& parameter, const ArrayView& gradient);

    [[noreturn]] static void throw_changed(const Parameter& parameter, const ArrayView& p);
};

}  // namespace fusedstep
