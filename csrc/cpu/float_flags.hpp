// Whether the processor has met denormals. Elsewhere than on x86-64 nothing asks.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../rules/inline.hpp"

namespace fusedstep {

#if defined(__x86_64__)
FUSEDSTEP_INLINE void clear_float_flags() {
    constexpr unsigned flags = 0x3F;
    if (const unsigned now = _mm_getcsr(); (now & flags) != 0) _mm_setcsr(now & ~flags);
}

FUSEDSTEP_INLINE bool denormals_were_met() {
    constexpr unsigned denormal_operand = 2;
    return (_mm_getcsr() & denormal_operand) != 0;
}
#else
FUSEDSTEP_INLINE void clear_float_flags() {}
FUSEDSTEP_INLINE bool denormals_were_met() { return false; }
#endif

}  // namespace fusedstep
