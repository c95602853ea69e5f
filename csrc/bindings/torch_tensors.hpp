// Tensors of PyTorch in host memory, read through DLPack's exchange functions: no array is made of them.
#pragma once

#include <memory>

#include "array_view.hpp"
#include "dlpack.hpp"
#include "gpu_arrays.hpp"

namespace fusedstep {

namespace dlpack {

inline char* memory(const Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

}  // namespace dlpack

// Whether a tensor is in host memory, C-contiguous and aligned, of a type and shape.
bool is_contiguous(const dlpack::Tensor& tensor, DType dtype, const py::ssize_t* shape, int dimensions);

// It never lets go of a type, so it may end without the GIL.
class TorchReader {
public:
    py::object gradient(py::handle tensor);

    // False for whatever is not exactly a torch.Tensor or torch.nn.Parameter, cannot be described, or is of a PyTorch
    // without the exchange functions (they came with 2.10).
    bool read(py::handle tensor, dlpack::Tensor& description);

private:
    void look_up();

    // Whether the memory holds the negative of the values, as of (x.conj()).imag, which a description does not say. It
    // is asked of what could be taken for contiguous.
    bool is_negative(py::handle tensor, const dlpack::Tensor& description) const;

    bool looked_up_ = false;
    py::handle tensor_type_, parameter_type_;
    std::unique_ptr<const Getter> gradient_;
    decltype(dlpack::ExchangeApi::tensor_from_object) describe_ = nullptr;
    PyCFunction is_negative_ = nullptr;
};

}  // namespace fusedstep
