#include "array_view.hpp"

#include <utility>

#include "gpu_arrays.hpp"

namespace fusedstep {
namespace {

// NumPy's type numbers, fixed by its ABI.
constexpr std::pair<int, DType> numpy_types[] = {{1, DType::int8},     {2, DType::uint8},    {4, DType::uint16},
                                                 {11, DType::float32}, {12, DType::float64}, {23, DType::float16}};

struct Descriptors {
    PyObject* float32 = py::dtype::of<float>().release().ptr();
    PyObject* float64 = py::dtype::of<double>().release().ptr();
};

// Looked up once and never released: they are alive as long as NumPy is.
const Descriptors& descriptors() {
    static const Descriptors found;
    return found;
}

// What to do about an object that is not a NumPy array.
[[noreturn]] void refuse(py::handle object, const ArrayName& name) {
    const std::string what = name.text();
    const std::string type = type_name(object);
    const std::string expected = what + ": expected a numpy.ndarray, got " + type;
    if (PyList_Check(object.ptr()) || PyTuple_Check(object.ptr())) {
        const bool in_a_list = name.index >= 0 || name.suffix != nullptr;
        throw py::type_error(in_a_list ? what + ": a " + type + " inside a list; pass one flat list of arrays"
                                       : expected + "; params is one array");
    }
    if (type.rfind("jax", 0) == 0) {
        throw py::type_error(what +
                             ": a jax.Array is immutable, so it cannot be updated in place; keep it in a "
                             "NumPy array (numpy.array(x) copies it)");
    }
    if (py::isinstance(object, py::module_::import("numpy").attr("generic"))) {
        throw py::type_error(expected + ", a scalar; pass numpy.asarray(" + what + ")");
    }
    if (type.rfind("torch", 0) == 0) {
        throw py::type_error(expected + "; pass tensor.detach().numpy(), which shares its memory");
    }
    if (py::hasattr(object, "__dlpack__")) {
        throw py::type_error(expected + "; numpy.from_dlpack(x) shares its memory");
    }
    if (PyDict_Check(object.ptr())) {
        throw py::type_error(expected + "; pass the dict's values as a list");
    }
    throw py::type_error(expected);
}

}  // namespace

std::string type_name(py::handle object) {
    const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())));
    const std::string module = py::str(type.attr("__module__"));
    const std::string name = py::str(type.attr("__qualname__"));
    return module == "builtins" ? name : module + "." + name;
}

[[gnu::always_inline]] inline bool read_usual_dtype(PyObject* descriptor, DType& dtype) {
    if (descriptor == descriptors().float32) {
        dtype = DType::float32;
        return true;
    }
    if (descriptor == descriptors().float64) {
        dtype = DType::float64;
        return true;
    }
    return false;
}

bool read_dtype(PyObject* descriptor, DType& dtype) {
    if (read_usual_dtype(descriptor, dtype)) return true;
    const auto object = py::reinterpret_borrow<py::object>(descriptor);
    if (!object.attr("isnative").cast<bool>()) return false;
    const int number = py::detail::array_descriptor1_proxy(descriptor)->type_num;
    for (const auto& [known, type] : numpy_types) {
        if (number != known) continue;
        dtype = type;
        return true;
    }
    // ml_dtypes has it, under a number that NumPy gave out.
    dtype = DType::bfloat16;
    return std::string(py::str(object.attr("name"))) == "bfloat16" && object.attr("itemsize").cast<int>() == 2;
}

std::string ArrayName::text() const {
    std::string text = role;
    if (suffix != nullptr) text += *suffix;
    if (index >= 0) text += "[" + std::to_string(index) + "]";
    return text;
}

int64_t ArrayView::size() const {
    int64_t size = 1;
    for (int d = 0; d < dimensions; ++d) size *= shape[d];
    return size;
}

std::string ArrayView::dtype_text() const {
    const py::object dtype = py::getattr(object, "dtype", py::none());
    if (dtype.is_none()) return known_dtype ? fusedstep::name(this->dtype) : "another dtype";
    const std::string name = py::str(py::getattr(dtype, "name", dtype));
    return py::getattr(dtype, "isnative", py::bool_(true)).cast<bool>() ? name : "byte-swapped " + name;
}

std::string ArrayView::shape_text() const {
    py::tuple lengths(dimensions);
    for (int d = 0; d < dimensions; ++d) lengths[d] = shape[d];
    return py::str(lengths);
}

bool ArrayView::same_shape(const ArrayView& other) const {
    if (dimensions != other.dimensions) return false;
    for (int d = 0; d < dimensions; ++d) {
        if (shape[d] != other.shape[d]) return false;
    }
    return true;
}

[[gnu::always_inline]] inline ArrayView view_ndarray(PyObject* object) {
    const auto* array = py::detail::array_proxy(object);
    ArrayView view;
    view.data = array->data;
    view.shape = array->dimensions;
    view.strides = array->strides;
    view.dimensions = array->nd;
    view.flags = array->flags;
    view.known_dtype = read_usual_dtype(array->descr, view.dtype) || read_dtype(array->descr, view.dtype);
    view.device = ArrayView::host;
    view.object = object;
    return view;
}

[[gnu::noinline]] ArrayView view_other(py::handle object, const ArrayName& name, GpuArrays& gpu_arrays) {
    if (!PyObject_TypeCheck(object.ptr(), py::detail::npy_api::get().PyArray_Type_)) {
        ArrayView view;
        if (!gpu_arrays.view(object, name, view)) refuse(object, name);
        return view;
    }
    // A subclass shares its memory as an array does, memmap for one; only a mask changes what it means.
    if (py::isinstance(object, py::module_::import("numpy.ma").attr("MaskedArray"))) {
        throw py::type_error(name.text() + ": a masked array, whose mask a step would not respect; pass its .data");
    }
    return view_ndarray(object.ptr());
}

ArrayView view_array(py::handle object, const ArrayName& name, GpuArrays& gpu_arrays) {
    const bool usual = Py_TYPE(object.ptr()) == py::detail::npy_api::get().PyArray_Type_;
    return usual ? view_ndarray(object.ptr()) : view_other(object, name, gpu_arrays);
}

}  // namespace fusedstep
