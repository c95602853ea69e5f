// The stateless functions: gd_step, adam_step.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedstep {

void bind_functions(pybind11::module_& module);

}  // namespace fusedstep
