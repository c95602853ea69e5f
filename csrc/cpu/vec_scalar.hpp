// The portable "vector" of one number: the reference for every other instruction set, and the only one
// on machines other than x86-64.
#pragma once

#include <cmath>

#include "../rules/inline.hpp"

namespace fusedstep::scalar {

template <class T>
struct Vec {
    using Element = T;
    static constexpr int lanes = 1;

    T x;

    FUSEDSTEP_INLINE explicit Vec(T value = 0) : x(value) {}

    FUSEDSTEP_INLINE static Vec load(const T* from) { return Vec(*from); }
    FUSEDSTEP_INLINE static Vec load(const T* from, int) { return Vec(*from); }
    FUSEDSTEP_INLINE void store(T* to) const { *to = x; }
    FUSEDSTEP_INLINE void store(T* to, int) const { *to = x; }

    FUSEDSTEP_INLINE friend Vec operator+(Vec a, Vec b) { return Vec(a.x + b.x); }
    FUSEDSTEP_INLINE friend Vec operator-(Vec a, Vec b) { return Vec(a.x - b.x); }
    FUSEDSTEP_INLINE friend Vec operator*(Vec a, Vec b) { return Vec(a.x * b.x); }
    FUSEDSTEP_INLINE friend Vec operator/(Vec a, Vec b) { return Vec(a.x / b.x); }
    FUSEDSTEP_INLINE friend Vec max(Vec a, Vec b) { return Vec(a.x > b.x ? a.x : b.x); }
    FUSEDSTEP_INLINE friend Vec sqrt(Vec a) { return Vec(root(a.x)); }
    FUSEDSTEP_INLINE friend Vec fma(Vec a, Vec b, Vec c) { return Vec(multiply_add(a.x, b.x, c.x)); }

private:
    FUSEDSTEP_INLINE static float root(float a) { return __builtin_sqrtf(a); }
    FUSEDSTEP_INLINE static double root(double a) { return __builtin_sqrt(a); }
    FUSEDSTEP_INLINE static float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
    FUSEDSTEP_INLINE static double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
};

using F32 = Vec<float>;
using F64 = Vec<double>;

}  // namespace fusedstep::scalar
