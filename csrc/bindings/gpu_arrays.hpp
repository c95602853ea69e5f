// Arrays on a GPU: what a step needs to know of them, from whichever library, and the stream to run on.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "../cuda/backend.hpp"
#include "array_view.hpp"

namespace fusedstep {

bool is_cupy_array(py::handle object);

// An attribute of a compiled type, read by calling its getter: to look it up each time costs more than to read it.
class Getter {
public:
    Getter(py::handle type, const char* name);

    explicit operator bool() const { return get_ != nullptr; }
    py::object operator()(py::handle object) const {
        return py::reinterpret_steal<py::object>(get_(object.ptr(), closure_));
    }

private:
    getter get_ = nullptr;
    void* closure_ = nullptr;
};

// Reads CuPy arrays of one type. It never lets go of that type, so it may end without the GIL.
class CupyReader {
public:
    explicit CupyReader(py::handle array);

    bool reads(py::handle array) const { return py::type::handle_of(array).is(array_type_); }

    py::object memory(py::handle array) const { return get(data_, "data", array); }
    py::object dtype(py::handle array) const { return get(dtype_, "dtype", array); }
    py::object shape(py::handle array) const { return get(shape_, "shape", array); }
    py::object strides(py::handle array) const { return get(strides_, "strides", array); }
    py::object pointer(py::handle memory) const { return get(pointer_, "ptr", memory); }
    py::object device(py::handle memory) const { return get(device_, "device_id", memory); }
    bool is_c_contiguous(py::handle array) const { return all_known_ && c_contiguous_(array).ptr() == Py_True; }

    // Quickly: where a C-contiguous array of this dtype and shape on this device lies; null for any other, for an
    // empty one, and for a CuPy that is not as we know it.
    char* contiguous_memory(py::handle array, py::handle dtype, const std::vector<py::ssize_t>& shape,
                            int device) const;

private:
    py::object get(const Getter& getter, const char* name, py::handle object) const;
    bool has_shape(py::handle array, const std::vector<py::ssize_t>& shape) const;
    static py::ssize_t number(const Getter& get, py::handle object);

    py::handle array_type_, memory_type_;
    Getter data_, dtype_, shape_, strides_, dimensions_, size_, c_contiguous_, pointer_, device_;
    bool all_known_;
};

// Keeps what the views of a call's GPU arrays point to.
class GpuArrays {
public:
    void clear();
    bool in_use() const { return backend_ != nullptr; }

    // Whether the object is an array on a GPU; then `view` describes it.
    bool view(py::handle object, const ArrayName& name, ArrayView& view);

    // What runs steps on the arrays that have been viewed.
    const GpuBackend& backend() const { return *backend_; }

    // The stream that the arrays' library is using, and so what is queued before and after a step.
    void* stream() const { return stream_; }

private:
    enum class Library { none, cupy, torch, other };

    bool describe(py::handle object, const ArrayName& name, ArrayView& view);
    void find_backend(py::handle array, const ArrayName& name);
    void view_cupy(py::handle array, const ArrayName& name, ArrayView& view);
    bool view_dlpack(py::handle array, const ArrayName& name, ArrayView& view);
    void view_interface(py::handle array, const ArrayName& name, ArrayView& view);
    void set_stream(Library library, void* stream, const ArrayName& name);
    py::ssize_t* new_extents(int dimensions);

    std::deque<std::vector<py::ssize_t>> extents_;
    size_t used_ = 0;
    std::unique_ptr<const CupyReader> cupy_;  // kept from call to call
    const GpuBackend* backend_ = nullptr;
    Library library_ = Library::none;
    void* stream_ = nullptr;
};

// Where a call's arrays are: all in host memory, or all on one GPU.
class Placement {
public:
    void clear() { device_ = unknown; }

    int device() const { return device_; }

    void check(const ArrayView& view, const ArrayName& name) {
        if (view.device != device_) begin_or_refuse(view, name);
    }

private:
    static constexpr int unknown = -2;

    // The first array of a call says where the others must be.
    void begin_or_refuse(const ArrayView& view, const ArrayName& name);

    int device_ = unknown;
    ArrayName first_{};
};

}  // namespace fusedstep
