#include "gpu_arrays.hpp"

#include <cstring>
#include <utility>

#include "dlpack.hpp"

namespace fusedstep {
namespace {

using NumPy = py::detail::npy_api;

constexpr int most_dimensions = 64;  // NumPy's own limit

// More than any GPU has, and few enough for the kernels to count chunks of.
constexpr int64_t most_bytes = int64_t{1} << 44;

// The default stream, by the handle that CUDA, DLPack and the array interface all give it.
void* const legacy_stream = reinterpret_cast<void*>(1);

void* stream_handle(py::handle number) {
    void* const handle = reinterpret_cast<void*>(number.cast<uintptr_t>());
    return handle == nullptr ? legacy_stream : handle;
}

// A module, if something has imported it.
py::handle loaded_module(const char* name) {
    return PyDict_GetItemString(PyImport_GetModuleDict(), name);  // borrowed
}

bool is_instance_of(py::handle object, const char* module, const char* type) {
    const py::handle loaded = loaded_module(module);
    return loaded && py::hasattr(loaded, type) && py::isinstance(object, loaded.attr(type));
}

// The element type that an array interface names. It has no name of its own for bfloat16.
bool read_typestr(const std::string& type, DType& dtype) {
    constexpr std::pair<const char*, DType> types[] = {{"<f4", DType::float32}, {"<f8", DType::float64},
                                                       {"<f2", DType::float16}, {"|i1", DType::int8},
                                                       {"|u1", DType::uint8},   {"<u2", DType::uint16}};
    for (const auto& [name, named] : types) {
        if (type != name) continue;
        dtype = named;
        return true;
    }
    return false;
}

bool read_dlpack_type(const dlpack::DataType& type, DType& dtype) {
    constexpr std::pair<dlpack::DataType, DType> types[] = {{{dlpack::floating, 32, 1}, DType::float32},
                                                            {{dlpack::floating, 64, 1}, DType::float64},
                                                            {{dlpack::floating, 16, 1}, DType::float16},
                                                            {{dlpack::bfloat, 16, 1}, DType::bfloat16},
                                                            {{dlpack::integer, 8, 1}, DType::int8},
                                                            {{dlpack::unsigned_integer, 8, 1}, DType::uint8},
                                                            {{dlpack::unsigned_integer, 16, 1}, DType::uint16}};
    for (const auto& [known, named] : types) {
        if (type.code != known.code || type.bits != known.bits || type.lanes != known.lanes) continue;
        dtype = named;
        return true;
    }
    return false;
}

// The flags that NumPy would give an array of this layout.
int layout_flags(const ArrayView& view, int item) {
    bool c = true, f = true, aligned = reinterpret_cast<uintptr_t>(view.data) % item == 0;
    bool empty = false;
    for (int d = 0; d < view.dimensions; ++d) empty = empty || view.shape[d] == 0;
    py::ssize_t expected_c = item, expected_f = item;
    for (int d = 0; d < view.dimensions && !empty; ++d) {
        const int e = view.dimensions - 1 - d;
        if (view.shape[e] != 1) c = c && view.strides[e] == expected_c;
        if (view.shape[d] != 1) f = f && view.strides[d] == expected_f;
        if (view.shape[d] != 1) aligned = aligned && view.strides[d] % item == 0;
        expected_c *= view.shape[e];
        expected_f *= view.shape[d];
    }
    return (c ? NumPy::NPY_ARRAY_C_CONTIGUOUS_ : 0) | (f ? NumPy::NPY_ARRAY_F_CONTIGUOUS_ : 0) |
           (aligned || empty ? NumPy::NPY_ARRAY_ALIGNED_ : 0);
}

void set_c_strides(py::ssize_t* strides, const ArrayView& view, py::ssize_t item) {
    for (int d = view.dimensions - 1; d >= 0; --d) {
        strides[d] = item;
        item *= view.shape[d];
    }
}

void read_tuple(py::handle sequence, int length, py::ssize_t* to) {
    const py::tuple numbers = py::reinterpret_steal<py::tuple>(PySequence_Tuple(sequence.ptr()));
    if (!numbers) throw py::error_already_set();
    if (static_cast<int>(numbers.size()) != length) throw py::cast_error("shape and strides of different lengths");
    for (const py::handle number : numbers) *to++ = number.cast<py::ssize_t>();
}

int checked_dimensions(int64_t dimensions) {
    if (dimensions < 0 || dimensions > most_dimensions) throw py::cast_error("more than 64 dimensions");
    return static_cast<int>(dimensions);
}

// A producer may describe what no array can be; a step would believe it.
void check_possible(const ArrayView& view) {
    if (view.device < 0) throw py::cast_error("its memory is on no GPU");
    int64_t bytes = view.known_dtype ? item_size(view.dtype) : 1;
    bool too_large = false, empty = false;
    for (int d = 0; d < view.dimensions; ++d) {
        if (view.shape[d] < 0) throw py::cast_error("a negative length in its shape");
        empty = empty || view.shape[d] == 0;
        too_large = too_large || __builtin_mul_overflow(bytes, view.shape[d], &bytes) || bytes > most_bytes;
    }
    if (empty) return;
    if (too_large) throw py::cast_error("its shape is larger than a GPU's memory");
    if (view.data == nullptr) throw py::cast_error("its pointer is null");
}

// The description inside a DLPack capsule, and whether the array may be written.
const dlpack::Tensor& tensor_in(const py::capsule& capsule, bool& writeable) {
    writeable = true;
    const char* const name = capsule.name() == nullptr ? "" : capsule.name();
    if (std::strcmp(name, "dltensor_versioned") == 0) {
        const auto* managed = capsule.get_pointer<dlpack::ManagedTensorVersioned>();
        if (managed->major != 1)
            throw py::cast_error("DLPack version " + std::to_string(managed->major) + " is not supported");
        writeable = (managed->flags & dlpack::flag_read_only) == 0;
        return managed->tensor;
    }
    if (std::strcmp(name, "dltensor") != 0) throw py::cast_error("not a DLPack capsule");
    return capsule.get_pointer<dlpack::ManagedTensor>()->tensor;
}

// Asks for a capsule with DLPack 1, then as producers older than that are asked.
py::capsule dlpack_capsule(py::handle array, int stream) {
    const py::object method = array.attr("__dlpack__");
    py::object exported;
    try {
        exported = method(py::arg("stream") = stream, py::arg("max_version") = py::make_tuple(1, 0));
    } catch (py::error_already_set& error) {
        if (!error.matches(PyExc_TypeError)) throw;
        exported = method(py::arg("stream") = stream);
    }
    if (!py::isinstance<py::capsule>(exported)) throw py::cast_error("not a DLPack capsule");
    return exported;
}

}  // namespace

bool is_cupy_array(py::handle object) { return is_instance_of(object, "cupy", "ndarray"); }

Getter::Getter(py::handle type, const char* name) {
    const py::object descriptor = py::getattr(type, name, py::none());
    if (Py_TYPE(descriptor.ptr()) != &PyGetSetDescr_Type) return;
    const auto* found = reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr());
    if (PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type.ptr()), PyDescr_TYPE(found)) == 0) return;
    get_ = found->d_getset->get;
    closure_ = found->d_getset->closure;
}

CupyReader::CupyReader(py::handle array)
    : array_type_(py::type::of(array).release()),
      memory_type_(py::type::of(array.attr("data")).release()),
      data_(array_type_, "data"),
      dtype_(array_type_, "dtype"),
      shape_(array_type_, "shape"),
      strides_(array_type_, "strides"),
      dimensions_(array_type_, "ndim"),
      size_(array_type_, "size"),
      c_contiguous_(array_type_, "_c_contiguous"),
      pointer_(memory_type_, "ptr"),
      device_(memory_type_, "device_id"),
      all_known_(data_ && dtype_ && shape_ && strides_ && dimensions_ && size_ && c_contiguous_ && pointer_ &&
                 device_) {}

py::object CupyReader::get(const Getter& getter, const char* name, py::handle object) const {
    const py::handle type = py::type::handle_of(object);
    if (!all_known_ || !(type.is(array_type_) || type.is(memory_type_))) return object.attr(name);
    py::object value = getter(object);
    if (!value) throw py::error_already_set();
    return value;
}

char* CupyReader::contiguous_memory(py::handle array, py::handle dtype, const std::vector<py::ssize_t>& shape,
                                    int device) const {
    char* found = nullptr;
    if (all_known_ && py::type::handle_of(array).is(array_type_) && c_contiguous_(array).ptr() == Py_True &&
        dtype_(array).is(dtype) && has_shape(array, shape)) {
        const py::object memory = data_(array);
        if (memory && py::type::handle_of(memory).is(memory_type_) && number(device_, memory) == device) {
            const py::object pointer = pointer_(memory);
            if (pointer) found = static_cast<char*>(PyLong_AsVoidPtr(pointer.ptr()));
        }
    }
    if (PyErr_Occurred() == nullptr) return found;
    PyErr_Clear();  // it is read the general way, which says what is wrong
    return nullptr;
}

// A tuple takes CuPy longer to make than all the rest.
bool CupyReader::has_shape(py::handle array, const std::vector<py::ssize_t>& shape) const {
    const py::ssize_t dimensions = static_cast<py::ssize_t>(shape.size());
    if (number(dimensions_, array) != dimensions) return false;
    if (dimensions == 0) return true;
    if (PyObject_Size(array.ptr()) != shape[0]) return false;
    if (dimensions == 1) return true;
    if (dimensions == 2) return number(size_, array) == shape[0] * shape[1];
    const py::object own = shape_(array);
    if (!own || PyTuple_GET_SIZE(own.ptr()) != dimensions) return false;
    for (py::ssize_t d = 0; d < dimensions; ++d) {
        if (PyLong_AsSsize_t(PyTuple_GET_ITEM(own.ptr(), d)) != shape[d]) return false;
    }
    return true;
}

py::ssize_t CupyReader::number(const Getter& get, py::handle object) {
    const py::object value = get(object);
    return value ? PyLong_AsSsize_t(value.ptr()) : -1;
}

void GpuArrays::clear() {
    used_ = 0;
    backend_ = nullptr;
    library_ = Library::none;
    stream_ = nullptr;
}

bool GpuArrays::view(py::handle object, const ArrayName& name, ArrayView& view) {
    const auto refuse = [&](const char* why) -> py::type_error {
        return py::type_error(name.text() + ": " + type_name(object) + " cannot be read as a GPU array: " + why);
    };
    view.object = object;
    view.flags = NumPy::NPY_ARRAY_WRITEABLE_;
    try {
        if (!describe(object, name, view)) return false;
        check_possible(view);
    } catch (const py::cast_error& error) {
        throw refuse(error.what());
    } catch (py::error_already_set& error) {
        if (!error.matches(PyExc_Exception)) throw;
        throw refuse(std::string(py::str(error.value())).c_str());
    }
    view.flags |= layout_flags(view, view.known_dtype ? item_size(view.dtype) : 1);
    return true;
}

bool GpuArrays::describe(py::handle object, const ArrayName& name, ArrayView& view) {
    const bool seen = cupy_ && cupy_->reads(object);
    if (seen || is_cupy_array(object)) {
        if (!seen) cupy_ = std::make_unique<CupyReader>(object);
        view_cupy(object, name, view);
        return true;
    }
    if (is_instance_of(object, "jax", "Array")) return false;
    if (py::hasattr(object, "__dlpack__")) return view_dlpack(object, name, view);
    if (!py::hasattr(object, "__cuda_array_interface__")) return false;
    view_interface(object, name, view);
    return true;
}

void GpuArrays::find_backend(py::handle array, const ArrayName& name) {
    if (backend_ != nullptr) return;
    const std::string is_gpu_array = name.text() + ": " + type_name(array) + " is a GPU array, but ";
    py::capsule capsule;
    try {
        capsule = py::module_::import("fusedstep._cuda").attr("backend");
    } catch (py::error_already_set& error) {
        if (error.matches(PyExc_ModuleNotFoundError)) {
            throw py::type_error(is_gpu_array +
                                 "this build of fusedstep has no CUDA backend; copy it to the host "
                                 "(cupy.asnumpy(x), x.cpu().numpy())");
        }
        if (!error.matches(PyExc_ImportError)) throw;
        throw py::type_error(is_gpu_array +
                             "fusedstep's CUDA backend does not load: " + std::string(py::str(error.value())));
    }
    const auto* backend = capsule.get_pointer<const GpuBackend>();
    if (std::strcmp(backend->version, FUSEDSTEP_VERSION) != 0) {
        throw py::type_error(is_gpu_array + "fusedstep._cuda is of version " + backend->version +
                             " and fusedstep._core of " FUSEDSTEP_VERSION "; install fusedstep again");
    }
    backend_ = backend;
}

void GpuArrays::view_cupy(py::handle array, const ArrayName& name, ArrayView& view) {
    find_backend(array, name);
    const py::object memory = cupy_->memory(array);
    const py::tuple shape = cupy_->shape(array);
    view.data = reinterpret_cast<char*>(cupy_->pointer(memory).cast<uintptr_t>());
    view.device = cupy_->device(memory).cast<int>();
    view.known_dtype = read_dtype(cupy_->dtype(array).ptr(), view.dtype);
    view.dimensions = checked_dimensions(static_cast<int64_t>(shape.size()));
    py::ssize_t* const extents = new_extents(view.dimensions);
    read_tuple(shape, view.dimensions, extents);
    view.shape = extents;
    view.strides = extents + view.dimensions;
    if (view.known_dtype && cupy_->is_c_contiguous(array))
        set_c_strides(extents + view.dimensions, view, item_size(view.dtype));
    else
        read_tuple(cupy_->strides(array), view.dimensions, extents + view.dimensions);
    if (library_ == Library::cupy) return;
    const py::object stream = loaded_module("cupy").attr("cuda").attr("get_current_stream")(view.device);
    set_stream(Library::cupy, stream_handle(stream.attr("ptr")), name);
}

bool GpuArrays::view_dlpack(py::handle array, const ArrayName& name, ArrayView& view) {
    const py::tuple where = array.attr("__dlpack_device__")();
    const int type = where[0].cast<int>();
    if (type != dlpack::cuda && type != dlpack::cuda_managed) return false;
    find_backend(array, name);
    // PyTorch says which stream it is using, and a step joins it. Others can only be told to have the data
    // ready for the default stream, where the step then runs.
    const bool torch = is_instance_of(array, "torch", "Tensor");
    const py::capsule capsule = dlpack_capsule(array, torch ? -1 : 1);
    bool writeable;
    const dlpack::Tensor& tensor = tensor_in(capsule, writeable);
    if (tensor.device.type != type) throw py::cast_error("__dlpack_device__ and __dlpack__ name different devices");
    if (!writeable) view.flags = 0;
    view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    view.device = tensor.device.id;
    view.dimensions = checked_dimensions(tensor.ndim);
    view.known_dtype = read_dlpack_type(tensor.dtype, view.dtype);
    py::ssize_t* const extents = new_extents(view.dimensions);
    view.shape = extents;
    view.strides = extents + view.dimensions;
    std::copy(tensor.shape, tensor.shape + tensor.ndim, extents);
    const py::ssize_t item = tensor.dtype.bits / 8;
    if (tensor.strides == nullptr) set_c_strides(extents + view.dimensions, view, item);
    for (int d = 0; d < tensor.ndim && tensor.strides != nullptr; ++d) {
        extents[view.dimensions + d] = tensor.strides[d] * item;
    }
    if (!torch) {
        set_stream(Library::other, legacy_stream, name);
    } else if (library_ != Library::torch) {
        const py::object stream = loaded_module("torch").attr("cuda").attr("current_stream")(view.device);
        set_stream(Library::torch, stream_handle(stream.attr("cuda_stream")), name);
    }
    return true;
}

void GpuArrays::view_interface(py::handle array, const ArrayName& name, ArrayView& view) {
    find_backend(array, name);
    const py::dict interface = array.attr("__cuda_array_interface__");
    const auto get = [&](const char* key) -> py::object {
        return interface.contains(key) ? py::object(interface[key]) : py::none();
    };
    if (!get("mask").is_none()) {
        throw py::type_error(name.text() + ": a masked array, whose mask a step would not respect");
    }
    const py::tuple data = interface["data"], shape = interface["shape"];
    view.data = reinterpret_cast<char*>(data[0].cast<uintptr_t>());
    if (data[1].cast<bool>()) view.flags = 0;
    const std::string type = py::str(interface["typestr"]);
    view.known_dtype = read_typestr(type, view.dtype);
    view.dimensions = checked_dimensions(static_cast<int64_t>(shape.size()));
    py::ssize_t* const extents = new_extents(view.dimensions);
    view.shape = extents;
    view.strides = extents + view.dimensions;
    read_tuple(shape, view.dimensions, extents);
    if (get("strides").is_none())
        set_c_strides(extents + view.dimensions, view, view.known_dtype ? item_size(view.dtype) : 1);
    else
        read_tuple(interface["strides"], view.dimensions, extents + view.dimensions);
    // The interface does not name the device; an empty array has no memory to ask about.
    view.device = view.data == nullptr ? 0 : backend_->device_of(view.data);
    const py::object stream = get("stream");
    set_stream(Library::other, stream.is_none() ? legacy_stream : stream_handle(stream), name);
}

void GpuArrays::set_stream(Library library, void* stream, const ArrayName& name) {
    if (library_ != Library::none && stream != stream_) {
        throw py::value_error(name.text() +
                              ": its library is using another CUDA stream than that of the arrays before it; make "
                              "one stream current in both (cupy.cuda.ExternalStream, torch.cuda.ExternalStream)");
    }
    library_ = library;
    stream_ = stream;
}

py::ssize_t* GpuArrays::new_extents(int dimensions) {
    if (used_ == extents_.size()) extents_.emplace_back();
    std::vector<py::ssize_t>& extents = extents_[used_++];
    extents.resize(2 * static_cast<size_t>(dimensions));
    return extents.data();
}

void Placement::begin_or_refuse(const ArrayView& view, const ArrayName& name) {
    if (device_ == unknown) {
        device_ = view.device;
        first_ = name;
        return;
    }
    const auto place = [](int device) {
        return device == ArrayView::host ? std::string("in host memory") : "on GPU " + std::to_string(device);
    };
    throw py::value_error(name.text() + ": " + place(view.device) + ", but " + first_.text() + " is " + place(device_) +
                          "; the arrays of a call must be in one place");
}

}  // namespace fusedstep
