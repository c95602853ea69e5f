// What a per-ISA object provides: a table of step loops by rule and element type.
#pragma once

#include <cstdint>

#include "../core/dtype.hpp"
#include "../rules/table.hpp"

namespace fusedstep {

using StepKernel = void (*)(void* const* streams, int64_t begin, int64_t count, const void* scalars);

struct KernelTable {
    StepKernel step[Rules::count][dtype_count];
};

namespace scalar {
extern const KernelTable kernels;
}
namespace avx2 {
extern const KernelTable kernels;
}
namespace avx512 {
extern const KernelTable kernels;
}

}  // namespace fusedstep
