// The part of DLPack's C interface (version 1) that reading an array's description needs, as
// https://dmlc.github.io/dlpack defines it.
#pragma once

#include <cstdint>

namespace fusedstep::dlpack {

enum DeviceType : int32_t { cpu = 1, cuda = 2, cuda_managed = 13 };
enum TypeCode : uint8_t { integer = 0, unsigned_integer = 1, floating = 2, bfloat = 4 };
constexpr uint64_t flag_read_only = 1;

struct Device {
    int32_t type;
    int32_t id;
};

struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements; null: C order
    uint64_t byte_offset;
};

struct ManagedTensor {
    Tensor tensor;
    void* context;
    void (*deleter)(ManagedTensor*);
};

struct ManagedTensorVersioned {
    uint32_t major, minor;
    void* context;
    void (*deleter)(ManagedTensorVersioned*);
    uint64_t flags;
    Tensor tensor;
};

}  // namespace fusedstep::dlpack
