// What a step in several parts needs beside the step itself: copies and the pieces of the norm.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedstep {

void bind_offload(pybind11::module_& module);

}  // namespace fusedstep
