// Tensors of PyTorch in host memory, read through its stable C interface: no array is made of them.
#pragma once

#include <memory>

#include "array_view.hpp"
#include "gpu_arrays.hpp"

namespace fusedstep {

// It never lets go of a type, so it may end without the GIL.
class TorchReader {
public:
    py::object gradient(py::handle tensor);

    // Where a tensor has its shape, which is a part of it. Null for whatever is not exactly a torch.Tensor or
    // torch.nn.Parameter, has none, or is of a PyTorch that is not as we know it.
    const int64_t* shape(py::handle tensor);

    struct Place {
        char* data;
        const int64_t* shape;
    };

    // Where a tensor lies that is in host memory, C-contiguous and aligned, of a type and shape; false for any other.
    bool read(py::handle tensor, DType dtype, const py::ssize_t* shape, int dimensions, Place& place);

private:
    // The functions of torch/csrc/inductor/aoti_torch/c/shim.h that this needs. They return 0, or else have no result.
    using Handle = void*;
    struct Functions {
        int (*device_type)(Handle, int32_t*) = nullptr;
        int (*dtype)(Handle, int32_t*) = nullptr;
        int (*is_contiguous)(Handle, bool*) = nullptr;
        int (*dim)(Handle, int64_t*) = nullptr;
        int (*sizes)(Handle, int64_t**) = nullptr;
        int (*data_ptr)(Handle, void**) = nullptr;
    };

    void look_up();
    bool find_functions();

    // Null for what is not of a known type.
    Handle handle_of(py::handle tensor);

    // Whether the memory holds the negative of the values, as of (x.conj()).imag.
    bool is_negative(py::handle tensor) const;

    bool looked_up_ = false;
    size_t tensor_at_ = 0;  // in the Python object; 0 where tensors cannot be read
    py::handle tensor_type_, parameter_type_;
    std::unique_ptr<const Getter> gradient_;
    PyCFunction is_negative_ = nullptr;
    Functions functions_;
    int32_t host_ = 0;
    int32_t dtypes_[4] = {};  // by DType
};

}  // namespace fusedstep
