#include "torch_tensors.hpp"

#include <dlfcn.h>

#include <cstring>
#include <type_traits>

namespace fusedstep {

py::object TorchReader::gradient(py::handle tensor) {
    if (!looked_up_) look_up();
    const py::handle type = py::type::handle_of(tensor);
    if (!*gradient_ || !(type.is(tensor_type_) || type.is(parameter_type_))) return tensor.attr("grad");
    py::object gradient = (*gradient_)(tensor);
    if (!gradient) throw py::error_already_set();
    return gradient;
}

const int64_t* TorchReader::shape(py::handle tensor) {
    const Handle handle = handle_of(tensor);
    int64_t* shape = nullptr;
    if (handle == nullptr || functions_.sizes(handle, &shape) != 0) return nullptr;
    return shape;
}

bool TorchReader::read(py::handle tensor, DType dtype, const py::ssize_t* shape, int dimensions, Place& place) {
    const Handle handle = handle_of(tensor);
    if (handle == nullptr) return false;
    int32_t device, type;
    bool contiguous;
    int64_t count, *sizes;
    void* data;
    if (functions_.device_type(handle, &device) != 0 || device != host_ || functions_.dtype(handle, &type) != 0 ||
        type != dtypes_[static_cast<int>(dtype)] || functions_.is_contiguous(handle, &contiguous) != 0 || !contiguous ||
        functions_.dim(handle, &count) != 0 || count != dimensions || functions_.sizes(handle, &sizes) != 0 ||
        functions_.data_ptr(handle, &data) != 0 || (reinterpret_cast<uintptr_t>(data) & (item_size(dtype) - 1)) != 0) {
        return false;
    }
    // A view that is negative is every other number of complex memory, so that two in a row are not contiguous.
    bool may_be_negative = true;
    for (int d = 0; d < dimensions; ++d) {
        if (sizes[d] != shape[d]) return false;
        may_be_negative = may_be_negative && shape[d] == 1;
    }
    if (may_be_negative && is_negative(tensor)) return false;
    place = {static_cast<char*>(data), sizes};
    return true;
}

TorchReader::Handle TorchReader::handle_of(py::handle tensor) {
    if (!looked_up_) look_up();
    const py::handle type = py::type::handle_of(tensor);
    if (tensor_at_ == 0 || !(type.is(tensor_type_) || type.is(parameter_type_))) return nullptr;
    // A handle is the address of an at::Tensor, which is a part of the Python object.
    return reinterpret_cast<char*>(tensor.ptr()) + tensor_at_;
}

bool TorchReader::is_negative(py::handle tensor) const {
    const auto negative = py::reinterpret_steal<py::object>(is_negative_(tensor.ptr(), nullptr));
    if (!negative) PyErr_Clear();  // the general way says what is wrong
    return !negative.is(py::handle(Py_False));
}

void TorchReader::look_up() {
    looked_up_ = true;
    const py::module_ torch = py::module_::import("torch");
    tensor_type_ = py::object(torch.attr("Tensor")).release();
    parameter_type_ = py::object(torch.attr("nn").attr("Parameter")).release();
    gradient_ = std::make_unique<const Getter>(tensor_type_, "grad");
    const py::object is_negative = tensor_type_.attr("is_neg");
    if (!Py_IS_TYPE(is_negative.ptr(), &PyMethodDescr_Type)) return;
    const PyMethodDef& method = *reinterpret_cast<PyMethodDescrObject*>(is_negative.ptr())->d_method;
    if (method.ml_flags != METH_NOARGS) return;
    is_negative_ = method.ml_meth;
    if (!find_functions()) return;
    // An at::Tensor is a pointer to what `_cdata` names. The object begins with it, or, as in PyTorch 2.8, with a
    // c10::MaybeOwned, in which it comes after a bool.
    const py::object tensor = torch.attr("empty")(0, py::arg("device") = "cpu");
    const auto named = tensor.attr("_cdata").cast<uintptr_t>();
    for (const size_t at : {sizeof(PyObject), sizeof(PyObject) + sizeof(void*)}) {
        uintptr_t pointer;
        std::memcpy(&pointer, reinterpret_cast<const char*>(tensor.ptr()) + at, sizeof(pointer));
        if (pointer == named) tensor_at_ = at;
    }
}

bool TorchReader::find_functions() {
    void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return false;
    bool all_found = true;
    const auto find = [&](const char* name, auto& function) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
        all_found = all_found && function != nullptr;
    };
    find("aoti_torch_get_device_type", functions_.device_type);
    find("aoti_torch_get_dtype", functions_.dtype);
    find("aoti_torch_is_contiguous", functions_.is_contiguous);
    find("aoti_torch_get_dim", functions_.dim);
    find("aoti_torch_get_sizes", functions_.sizes);
    find("aoti_torch_get_data_ptr", functions_.data_ptr);
    const auto find_number = [&](const char* name, int32_t& number) {
        int32_t (*function)();
        find(name, function);
        if (function != nullptr) number = function();
    };
    find_number("aoti_torch_device_type_cpu", host_);
    find_number("aoti_torch_dtype_float32", dtypes_[static_cast<int>(DType::float32)]);
    find_number("aoti_torch_dtype_float64", dtypes_[static_cast<int>(DType::float64)]);
    find_number("aoti_torch_dtype_bfloat16", dtypes_[static_cast<int>(DType::bfloat16)]);
    find_number("aoti_torch_dtype_float16", dtypes_[static_cast<int>(DType::float16)]);
    return all_found;
}

}  // namespace fusedstep
