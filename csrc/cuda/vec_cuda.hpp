// The number type of the CUDA kernels: one lane, every operation rounded once, as on the CPU. Compiled for
// the host, where tests run the kernels' own source, it means the same.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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

// One lane of integers, for the storage formats; `if_greater(a, b, yes, no)` compares them as signed ones.
struct U32 {
    uint32_t x;

    FUSEDSTEP_INLINE explicit U32(uint32_t value = 0) : x(value) {}

    FUSEDSTEP_INLINE friend U32 operator+(U32 a, U32 b) { return U32(a.x + b.x); }
    FUSEDSTEP_INLINE friend U32 operator-(U32 a, U32 b) { return U32(a.x - b.x); }
    FUSEDSTEP_INLINE friend U32 operator*(U32 a, U32 b) { return U32(a.x * b.x); }
    FUSEDSTEP_INLINE friend U32 operator&(U32 a, U32 b) { return U32(a.x & b.x); }
    FUSEDSTEP_INLINE friend U32 operator|(U32 a, U32 b) { return U32(a.x | b.x); }
    FUSEDSTEP_INLINE friend U32 operator^(U32 a, U32 b) { return U32(a.x ^ b.x); }
    FUSEDSTEP_INLINE friend U32 and_or(U32 a, U32 b, U32 c) { return (a & b) | c; }
    FUSEDSTEP_INLINE friend U32 operator<<(U32 a, int n) { return U32(a.x << n); }
    FUSEDSTEP_INLINE friend U32 operator>>(U32 a, int n) { return U32(a.x >> n); }
    FUSEDSTEP_INLINE friend U32 max(U32 a, U32 b) { return U32(a.x > b.x ? a.x : b.x); }
    FUSEDSTEP_INLINE friend U32 if_greater(U32 a, U32 b, U32 yes, U32 no) {
        return static_cast<int32_t>(a.x) > static_cast<int32_t>(b.x) ? yes : no;
    }
};

template <>
struct Vec<float> {
    using Element = float;
    using Bits = U32;

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
    FUSEDSTEP_INLINE friend Vec min(Vec a, Vec b) { return Vec(a.x < b.x ? a.x : b.x); }
    FUSEDSTEP_INLINE friend Vec sqrt(Vec a) { return Vec(FUSEDSTEP_ROUNDED(__fsqrt_rn(a.x), std::sqrt(a.x))); }
    FUSEDSTEP_INLINE friend Vec fma(Vec a, Vec b, Vec c) {
        return Vec(FUSEDSTEP_ROUNDED(__fmaf_rn(a.x, b.x, c.x), std::fma(a.x, b.x, c.x)));
    }
    FUSEDSTEP_INLINE friend Vec fms(Vec a, Vec b, Vec c) { return fma(a, b, Vec(-c.x)); }
    FUSEDSTEP_INLINE friend Vec number_or(Vec a, Vec b) { return a.x == a.x ? a : b; }
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

template <class To, class From>
FUSEDSTEP_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

FUSEDSTEP_INLINE U32 bits_of(Vec<float> value) { return U32(bit_cast<uint32_t>(value.x)); }
FUSEDSTEP_INLINE Vec<float> from_bits(U32 bits) { return Vec<float>(bit_cast<float>(bits.x)); }

}  // namespace fusedstep::cuda
