// The native half of an optimizer: it holds the checked parameters and their state, so that a step only
// has to check the gradients.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedstep {

void bind_optimizer(pybind11::module_& module);

}  // namespace fusedstep
