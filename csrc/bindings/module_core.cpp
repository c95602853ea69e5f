// The extension fusedstep._core: the boundary and the CPU kernels.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "../cpu/dispatch.hpp"
#include "../cpu/float_environment.hpp"
#include "../cpu/run.hpp"
#include "../cpu/thread_count.hpp"
#include "../cpu/thread_pool.hpp"
#include "../formats/random.hpp"
#include "functions.hpp"
#include "offload.hpp"
#include "optimizer.hpp"

namespace cpu = fusedstep::cpu;
namespace py = pybind11;

// For threadpoolctl, which looks these up in the loaded library.
extern "C" {
__attribute__((visibility("default"))) int fusedstep_get_num_threads() { return cpu::num_threads(); }
__attribute__((visibility("default"))) void fusedstep_set_num_threads(int count) {
    if (count >= 1) cpu::set_num_threads(count);
}
}

namespace {

py::tuple names(bool supported_only) {
    py::list names;
    for (const cpu::Isa& isa : cpu::built_isas()) {
        if (isa.supported || !supported_only) names.append(isa.name);
    }
    return py::tuple(names);
}

void set_num_threads(py::handle count) {
    int overflow = 0;
    const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(count.ptr()));
    if (!index) {
        PyErr_Clear();
        throw py::type_error(std::string("num_threads: expected an integer, got ") + Py_TYPE(count.ptr())->tp_name);
    }
    const long value = PyLong_AsLongAndOverflow(index.ptr(), &overflow);
    if (overflow != 0 || value < 1 || value > cpu::most_threads) {
        throw py::value_error("num_threads: expected an integer from 1 to " + std::to_string(cpu::most_threads) +
                              ", got " + std::string(py::str(index)));
    }
    cpu::set_num_threads(static_cast<int>(value));
}

void fill_zero(py::handle array) {
    const py::buffer_info buffer = py::reinterpret_borrow<py::buffer>(array).request(true);
    const py::gil_scoped_release release;
    cpu::fill_zero(buffer.ptr, static_cast<size_t>(buffer.size * buffer.itemsize));
}

// A codec's values have room for whole blocks.
size_t whole_blocks(int64_t count) {
    return static_cast<size_t>(fusedstep::block_count(count) * fusedstep::block_elements);
}

// What 8-bit codes stand for, and back. The arrays are an optimizer's own, contiguous and of the right sizes.
template <class Pass>
void pass_8bit(const py::array& codes, const py::array& units, const py::array& values, const Pass& pass) {
    const fusedstep::Stream stream{const_cast<void*>(codes.data()), const_cast<void*>(units.data())};
    const auto format = codes.dtype().kind() == 'i' ? fusedstep::Format::signed8 : fusedstep::Format::unsigned8;
    const cpu::FloatEnvironment ieee;
    pass(cpu::chosen_isa().kernels->codec[static_cast<int>(format)], stream, codes.size(),
         static_cast<float*>(const_cast<void*>(values.data())));
}

void decode_8bit(const py::array& codes, const py::array& units, const py::array& values) {
    std::vector<float> whole(whole_blocks(codes.size()));
    pass_8bit(codes, units, values,
              [&](const fusedstep::Codec& codec, const fusedstep::Stream& stream, int64_t count, float* to) {
                  codec.decode(stream, 0, count, whole.data());
                  std::copy(whole.begin(), whole.begin() + count, to);
              });
}

void encode_8bit(const py::array& values, const py::array& codes, const py::array& units) {
    pass_8bit(codes, units, values,
              [&](const fusedstep::Codec& codec, const fusedstep::Stream& stream, int64_t count, const float* from) {
                  std::vector<float> whole(whole_blocks(count));
                  std::copy(from, from + count, whole.begin());
                  codec.encode(stream, 0, count, 0, fusedstep::random_stream(0, 0), whole.data());
              });
}

py::dict config() {
    py::dict config;
    config["version"] = FUSEDSTEP_VERSION;
    config["compiler"] = FUSEDSTEP_COMPILER;
    config["built_isas"] = names(false);
    config["supported_isas"] = names(true);
    config["isa"] = cpu::chosen_isa().name;
    config["isa_reason"] = cpu::chosen_isa_reason();
    config["num_threads"] = cpu::num_threads();
    config["num_threads_reason"] = cpu::num_threads_reason();
    return config;
}

}  // namespace

PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
    module.doc() = "The boundary and the CPU kernels of fusedstep.";
    module.attr("__version__") = FUSEDSTEP_VERSION;
    fusedstep::bind_functions(module);
    fusedstep::bind_optimizer(module);
    fusedstep::bind_offload(module);
    module.def("config", &config);
    module.def("available_isas", [] { return names(true); });
    module.def("get_isa", [] { return cpu::chosen_isa().name; });
    module.def("set_isa", &cpu::choose_isa);
    module.def("made_by_intel", &cpu::made_by_intel);
    module.def("set_made_by_intel", &cpu::set_made_by_intel);
    module.def("get_num_threads", &cpu::num_threads);
    module.def("set_num_threads", &set_num_threads);
    module.def("cgroup_cpu_limit", &cpu::cgroup_cpu_limit);
    module.def("fill_zero", &fill_zero);
    module.def("decode_8bit", &decode_8bit);
    module.def("encode_8bit", &encode_8bit);
}
