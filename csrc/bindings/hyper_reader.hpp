// Hyper-parameters from Python: types, ranges and names are checked here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "../core/dtype.hpp"
#include "../rules/hyper.hpp"

namespace fusedstep {

namespace py = pybind11;

// Where values come from, for errors ("", or "param_groups[1]: "), and the number of the step about to be
// taken for values that are schedules (0: schedules are not allowed here). A schedule that is not to be
// called stands for a number that is in range.
struct HyperSource {
    std::string prefix;
    int64_t step = 0;
    bool call_schedules = true;
    bool lr_on_gpu = false;  // it is not read here, and stands for a number that is in range
};

double read_number(py::handle value, const char* name, const HyperSource& source);
bool read_flag(py::handle value, const char* name, const HyperSource& source);
void read_betas(py::handle value, double& beta1, double& beta2, const HyperSource& source);
int64_t read_step(py::handle value, const std::string& name);
double read_clip_norm(py::handle value);

// Throw ValueError for what no step may be taken with.
void check_hyper(const GdHyper& hyper, const HyperSource& source);
void check_hyper(const AdamHyper& hyper, const HyperSource& source);

// A float32 parameter takes only what float32 can hold.
void check_scalars(const GdHyper& hyper, const GdScalars<float>& scalars);
void check_scalars(const AdamHyper& hyper, const AdamScalars<float>& scalars);
inline void check_scalars(const GdHyper&, const GdScalars<double>&) {}
void check_scalars(const AdamHyper& hyper, const AdamScalars<double>& scalars);

}  // namespace fusedstep
