// Rules run inside the loops of every backend, so every function of a rule is inlined there; this also
// keeps code for one instruction set from being linked into another.
#pragma once

#if defined(__CUDACC__)
#define FUSEDSTEP_INLINE __host__ __device__ __forceinline__
#else
#define FUSEDSTEP_INLINE inline __attribute__((always_inline))
#endif
