// What is indexed in a loop is to end up in registers; what is seldom run is to be short.
#pragma once

#if defined(__CUDA_ARCH__)
#define FUSEDSTEP_UNROLL _Pragma("unroll")
#define FUSEDSTEP_KEEP_LOOP _Pragma("unroll 1")
#else
#define FUSEDSTEP_UNROLL
#define FUSEDSTEP_KEEP_LOOP
#endif
