// Compiled once per instruction set, with FUSEDSTEP_ISA naming it. Everything here is inlined, or a
// template over that ISA's vector types, so no two of these objects share a symbol.
#include "kernels.hpp"

#include "step_loop.hpp"

#define FUSEDSTEP_STRINGIZE(x) #x
#define FUSEDSTEP_HEADER(isa) FUSEDSTEP_STRINGIZE(vec_##isa.hpp)
#define FUSEDSTEP_VEC_HEADER(isa) FUSEDSTEP_HEADER(isa)
#include FUSEDSTEP_VEC_HEADER(FUSEDSTEP_ISA)

namespace fusedstep::FUSEDSTEP_ISA {
namespace {

template <class... All>
constexpr KernelTable table_of(RuleList<All...>) {
    return {{{step_loop<All, F32>, step_loop<All, F64>}...}};
}

}  // namespace

extern const KernelTable kernels = table_of(Rules{});

}  // namespace fusedstep::FUSEDSTEP_ISA
