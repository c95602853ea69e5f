// The number type of the CUDA kernels: one lane, every operation rounded once, as on the CPU. Compiled for
// the host, where tests run the kernels' own source, it means the same.
#pragma once

#include <cmath>

#include "../rules/inline.hpp"

namespace fusedstep::cuda {

template <class T>
struct Vec;

// The intrinsics are correctly rounded whatever the compiler's flags are, and are never contracted.
#if defined(__CUDA_ARCH__)
#define FUSEDSTEP_ROUNDED(device, host) device
#else
#define FUSEDSTEP_ROUNDED(device, host) host
#endif

template <>
struct Vec<float> {
    using Element = float;

    float x;

    FUSEDSTEP_INLINE explicit Vec(float value = 0) : x(value) {}

    FUSEDSTEP_INLINE friend Vec operator+(Vec a, Vec b) {
        return Vec(FUSEDSTEP_ROUNDED(__fadd_rn(a.x, b.x), a.x + b.x));
    }
    FUSEDSTEP_INLINE friend Vec operator-(Vec a, Vec b) {
        return Vec(FUSEDSTEP_ROUNDED(__fsub_rn(a.x, b.x), a.x - b.x));
    }
    FUSEDSTEP_INLINE friend Vec operator*(Vec a, Vec b) {
        return Vec(FUSEDSTEP_ROUNDED(__fmul_rn(a.x, b.x), a.x * b.x));
    }
    FUSEDSTEP_INLINE friend Vec operator/(Vec a, Vec b) {
        return Vec(FUSEDSTEP_ROUNDED(__fdiv_rn(a.x, b.x), a.x / b.x));
    }
    FUSEDSTEP_INLINE friend Vec max(Vec a, Vec b) { return Vec(a.x > b.x ? a.x : b.x); }
    FUSEDSTEP_INLINE friend Vec sqrt(Vec a) { return Vec(FUSEDSTEP_ROUNDED(__fsqrt_rn(a.x), std::sqrt(a.x))); }
    FUSEDSTEP_INLINE friend Vec fma(Vec a, Vec b, Vec c) {
        return Vec(FUSEDSTEP_ROUNDED(__fmaf_rn(a.x, b.x, c.x), std::fma(a.x, b.x, c.x)));
    }
};

template <>
struct Vec<double> {
    using Element = double;

    double x;

    FUSEDSTEP_INLINE explicit Vec(double value = 0) : x(value) {}

    FUSEDSTEP_INLINE friend Vec operator+(Vec a, Vec b) {
        return Vec(FUSEDSTEP_ROUNDED(__dadd_rn(a.x, b.x), a.x + b.x));
    }
    FUSEDSTEP_INLINE friend Vec operator-(Vec a, Vec b) {
        return Vec(FUSEDSTEP_ROUNDED(__dsub_rn(a.x, b.x), a.x - b.x));
    }
    FUSEDSTEP_INLINE friend Vec operator*(Vec a, Vec b) {
        return Vec(FUSEDSTEP_ROUNDED(__dmul_rn(a.x, b.x), a.x * b.x));
    }
    FUSEDSTEP_INLINE friend Vec operator/(Vec a, Vec b) {
        return Vec(FUSEDSTEP_ROUNDED(__ddiv_rn(a.x, b.x), a.x / b.x));
    }
    FUSEDSTEP_INLINE friend Vec max(Vec a, Vec b) { return Vec(a.x > b.x ? a.x : b.x); }
    FUSEDSTEP_INLINE friend Vec sqrt(Vec a) { return Vec(FUSEDSTEP_ROUNDED(__dsqrt_rn(a.x), std::sqrt(a.x))); }
    FUSEDSTEP_INLINE friend Vec fma(Vec a, Vec b, Vec c) {
        return Vec(FUSEDSTEP_ROUNDED(__fma_rn(a.x, b.x, c.x), std::fma(a.x, b.x, c.x)));
    }
};

#undef FUSEDSTEP_ROUNDED

}  // namespace fusedstep::cuda
