// What a step needs to know of an array, read straight from the array object: nothing is converted and
// nothing is copied, so an update can never land in a temporary.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "../core/dtype.hpp"

namespace fusedstep {

namespace py = pybind11;

// How an error names an array: "grads", "grads[3]", "grads['w2']", "grads[1][3]".
struct ArrayName {
    const char* role;
    int64_t index = -1;
    const std::string* suffix = nullptr;

    std::string text() const;
};

struct ArrayView {
    static constexpr int host = -1;

    char* data;
    const py::ssize_t* shape;
    const py::ssize_t* strides;
    int dimensions;
    int flags;
    DType dtype;
    bool known_dtype;  // false: an ndarray of a type that no kernel has
    int device;        // `host`, or the number of a GPU
    py::handle object;

    bool c_contiguous() const { return (flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_) != 0; }
    bool f_contiguous() const { return (flags & py::detail::npy_api::NPY_ARRAY_F_CONTIGUOUS_) != 0; }
    bool aligned() const { return (flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0; }
    bool writeable() const { return (flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_) != 0; }
    bool is_of_compute_type() const { return known_dtype && dtype == compute_type(dtype); }
    int64_t size() const;
    std::string dtype_text() const;
    std::string shape_text() const;
    bool same_shape(const ArrayView& other) const;
    // The library whose functions an error advises.
    const char* library() const { return device == host ? "numpy" : "cupy"; }
};

class GpuArrays;

// Throws TypeError, with advice, for anything that is neither a NumPy array nor an array on a GPU; what a view
// of the latter points to is kept by `gpu_arrays`.
ArrayView view_array(py::handle object, const ArrayName& name, GpuArrays& gpu_arrays);

// "cupy.ndarray"
std::string type_name(py::handle object);

// The element type of a NumPy dtype; false when no kernel has it.
bool read_dtype(PyObject* descriptor, DType& dtype);

}  // namespace fusedstep
