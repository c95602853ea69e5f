// The extension fusedstep._cuda: the CUDA kernels, as a backend for fusedstep._core, and what there is to say
// about them. It loads without a driver or a GPU.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "../cuda/backend.hpp"
#include "../cuda/device.hpp"
#include "../cuda/error.hpp"
#include "../cuda/launch.hpp"

namespace cuda = fusedstep::cuda;
namespace py = pybind11;

namespace {

constexpr fusedstep::GpuBackend backend{FUSEDSTEP_VERSION, cuda::launch, cuda::begin_gd_step, cuda::begin_adam_step,
                                        cuda::launch_norm, cuda::load,   cuda::load_norm,     cuda::device_of};

py::list devices() {
    py::list devices;
    int count = 0;
    cuda::check_driver();
    cuda::check(cudaGetDeviceCount(&count));
    for (int i = 0; i < count; ++i) {
        cudaDeviceProp properties;
        cuda::check(cudaGetDeviceProperties(&properties, i));
        devices.append(py::dict(
            py::arg("name") = properties.name,
            py::arg("compute_capability") = std::to_string(properties.major) + "." + std::to_string(properties.minor)));
    }
    return devices;
}

// `error` is why no GPU can be used, or None.
py::dict info() {
    py::dict info;
    info["toolkit"] = cuda::version_text(CUDART_VERSION);
    info["driver"] = cuda::driver_version();
    info["architectures"] = FUSEDSTEP_CUDA_ARCHITECTURES;
    info["devices"] = py::list();
    info["error"] = py::none();
    try {
        info["devices"] = devices();
    } catch (const std::exception& error) {
        info["error"] = error.what();
    }
    return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
    module.doc() = "The CUDA kernels of fusedstep.";
    module.attr("backend") = py::capsule(&backend, fusedstep::GpuBackend::capsule_name);
    module.def("info", &info);
    module.def("launch_count", [] { return cuda::launches.load(std::memory_order_relaxed); });
    module.def("error_text", [](int error, const std::string& driver) {
        return cuda::error_text(static_cast<cudaError_t>(error), driver);
    });
}
