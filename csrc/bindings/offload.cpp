#include "offload.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstring>
#include <deque>

#include "../core/norm.hpp"
#include "../cpu/copy.hpp"
#include "../cpu/norm.hpp"
#include "../cpu/parallel_for.hpp"
#include "array_view.hpp"

namespace py = pybind11;

namespace fusedstep {
namespace {

// Copies between contiguous arrays of one size that do not overlap. `past_caches`: the processor will not read
// the target.
void copy_bytes(const py::array& source, py::array target, bool past_caches) {
    const int64_t bytes = source.nbytes();
    if (target.nbytes() != bytes) throw py::value_error("copy_bytes: the arrays differ in size");
    const char* const from = static_cast<const char*>(source.data());
    char* const to = static_cast<char*>(target.mutable_data());
    const py::gil_scoped_release release;
    cpu::parallel_for(bytes, 2 * bytes, [&](int64_t begin, int64_t end) {
        if (past_caches)
            cpu::copy_past_caches(to + begin, from + begin, end - begin);
        else
            std::memcpy(to + begin, from + begin, end - begin);
    });
}

Format format_of(DType gradient, DType compute) {
    if (gradient == compute) return Format::native;
    if (compute == DType::float32 && gradient == DType::bfloat16) return Format::bfloat16;
    if (compute == DType::float32 && gradient == DType::float16) return Format::float16;
    throw py::type_error(std::string("sums_of_squares: ") + name(gradient));
}

// The sums of the blocks of contiguous gradients, one gradient after the other, as the norm of a step has them
// (core/norm.hpp). `float64`: that is what their parameters are, else another type.
void sums_of_squares(const py::list& gradients, bool float64, py::array_t<double> sums) {
    const DType compute = float64 ? DType::float64 : DType::float32;
    cpu::GradientNorm norm;
    std::deque<Storage> stores;
    std::deque<Tensor> tensors;
    int64_t blocks = 0;
    for (const py::handle item : gradients) {
        const auto gradient = py::reinterpret_borrow<py::array>(item);
        DType dtype;
        if (!read_dtype(gradient.dtype().ptr(), dtype)) throw py::type_error("sums_of_squares: an unknown type");
        Tensor& tensor = tensors.emplace_back(Tensor{{}, gradient.size(), nullptr});
        tensor.streams[gradient_stream] = const_cast<void*>(gradient.data());
        const Format format = format_of(dtype, compute);
        if (format != Format::native) {
            tensor.storage = &stores.emplace_back();
            stores.back().formats[gradient_stream] = format;
        }
        norm.add(tensor, compute);
        blocks += (gradient.size() + norm_block - 1) / norm_block;
    }
    if (sums.size() != blocks) throw py::value_error("sums_of_squares: " + std::to_string(blocks) + " sums expected");
    double* const to = sums.mutable_data();
    const py::gil_scoped_release release;
    const std::vector<double>& found = norm.sums_of_blocks();
    std::copy(found.begin(), found.end(), to);
}

}  // namespace

void bind_offload(py::module_& module) {
    module.def("copy_bytes", &copy_bytes);
    module.def("sums_of_squares", &sums_of_squares);
}

}  // namespace fusedstep
