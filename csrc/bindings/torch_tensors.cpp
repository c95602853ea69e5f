#include "torch_tensors.hpp"

namespace fusedstep {
namespace {

dlpack::DataType dlpack_type(DType dtype) {
    const auto bits = static_cast<uint8_t>(8 * item_size(dtype));
    return {dtype == DType::bfloat16 ? dlpack::bfloat : dlpack::floating, bits, 1};
}

}  // namespace

bool is_contiguous(const dlpack::Tensor& tensor, DType dtype, const py::ssize_t* shape, int dimensions) {
    const dlpack::DataType type = dlpack_type(dtype);
    if (tensor.device.type != dlpack::cpu || tensor.dtype.code != type.code || tensor.dtype.bits != type.bits ||
        tensor.dtype.lanes != 1 || tensor.ndim != dimensions ||
        (reinterpret_cast<uintptr_t>(dlpack::memory(tensor)) & (item_size(dtype) - 1)) != 0) {
        return false;
    }
    int64_t stride = 1;
    for (int d = dimensions - 1; d >= 0; --d) {
        if (tensor.shape[d] != shape[d]) return false;
        if (tensor.strides != nullptr && shape[d] != 1 && tensor.strides[d] != stride) return false;
        stride *= shape[d];
    }
    return true;
}

py::object TorchReader::gradient(py::handle tensor) {
    if (!looked_up_) look_up();
    const py::handle type = py::type::handle_of(tensor);
    if (!*gradient_ || !(type.is(tensor_type_) || type.is(parameter_type_))) return tensor.attr("grad");
    py::object gradient = (*gradient_)(tensor);
    if (!gradient) throw py::error_already_set();
    return gradient;
}

bool TorchReader::read(py::handle tensor, dlpack::Tensor& description) {
    if (!looked_up_) look_up();
    const py::handle type = py::type::handle_of(tensor);
    if (describe_ == nullptr || !(type.is(tensor_type_) || type.is(parameter_type_))) return false;
    if (describe_(tensor.ptr(), &description) == 0 && !is_negative(tensor, description)) return true;
    PyErr_Clear();  // the general way says what is wrong
    return false;
}

bool TorchReader::is_negative(py::handle tensor, const dlpack::Tensor& description) const {
    // It is every other number of complex memory, so that two in a row are not contiguous.
    for (int d = 0; d < description.ndim; ++d) {
        if (description.shape[d] != 1) return false;
    }
    return !py::reinterpret_steal<py::object>(is_negative_(tensor.ptr(), nullptr)).is(py::handle(Py_False));
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
    const py::object capsule = py::getattr(tensor_type_, "__dlpack_c_exchange_api__", py::none());
    if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
        const auto* api =
            static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        while (api != nullptr && api->major != 1) api = api->previous;
        if (api != nullptr) describe_ = api->tensor_from_object;
    }
}

}  // namespace fusedstep
