// Which instruction set runs: built, supported by this processor, chosen.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace fusedstep::cpu {

struct Isa {
    const char* name;
    const KernelTable* kernels;
    bool supported;  // by the processor and the operating system
};

// The instruction sets in this build, slowest first.
const std::vector<Isa>& built_isas();

// The instruction set in use and why. The first use reads FUSEDSTEP_ISA, else takes the best supported.
// Both throw std::invalid_argument for a name that cannot be used.
const Isa& chosen_isa();
std::string chosen_isa_reason();
void choose_isa(const std::string& name);

// Which of two ways is the faster one depends on who made the processor. Tests may say so of any.
bool made_by_intel();
void set_made_by_intel(bool value);

}  // namespace fusedstep::cpu
