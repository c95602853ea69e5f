// The portable "vector" of one number: the reference for every other instruction set, and the only one
// on machines other than x86-64. fma(a, b, c) is a * b + c, fms(a, b, c) is a * b - c, both rounded once. U32 is the
// same number of lanes of integers: `if_greater(a, b, yes, no)` compares them as signed ones, `greatest` is of all
// lanes.
#pragma once

#include <cstdint>
#include <cstring>

#include "../formats/words.hpp"
#include "../rules/inline.hpp"
#include "natural_order.hpp"

namespace fusedstep::scalar {

struct U32;

template <class T>
struct Vec {
    using Element = T;
    using Bits = U32;
    using OwnRoot = Vec;
    static constexpr int lanes = 1;

    T x;

    FUSEDSTEP_INLINE explicit Vec(T value = 0) : x(value) {}

    template <class From>
    FUSEDSTEP_INLINE static Vec load(const From* from) {
        return Vec(*from);
    }
    FUSEDSTEP_INLINE static Vec load(const T* from, int) { return Vec(*from); }
    FUSEDSTEP_INLINE void store(T* to) const { *to = x; }
    FUSEDSTEP_INLINE void store(T* to, int) const { *to = x; }

    FUSEDSTEP_INLINE friend Vec operator+(Vec a, Vec b) { return Vec(a.x + b.x); }
    FUSEDSTEP_INLINE friend Vec operator-(Vec a, Vec b) { return Vec(a.x - b.x); }
    FUSEDSTEP_INLINE friend Vec operator*(Vec a, Vec b) { return Vec(a.x * b.x); }
    FUSEDSTEP_INLINE friend Vec operator/(Vec a, Vec b) { return Vec(a.x / b.x); }
    FUSEDSTEP_INLINE friend Vec max(Vec a, Vec b) { return Vec(a.x > b.x ? a.x : b.x); }
    FUSEDSTEP_INLINE friend Vec min(Vec a, Vec b) { return Vec(a.x < b.x ? a.x : b.x); }
    FUSEDSTEP_INLINE friend Vec sqrt(Vec a) { return Vec(root(a.x)); }
    FUSEDSTEP_INLINE friend Vec fma(Vec a, Vec b, Vec c) { return Vec(multiply_add(a.x, b.x, c.x)); }
    FUSEDSTEP_INLINE friend Vec fms(Vec a, Vec b, Vec c) { return Vec(multiply_add(a.x, b.x, -c.x)); }

private:
    FUSEDSTEP_INLINE static float root(float a) { return __builtin_sqrtf(a); }
    FUSEDSTEP_INLINE static double root(double a) { return __builtin_sqrt(a); }
    FUSEDSTEP_INLINE static float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
    FUSEDSTEP_INLINE static double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
};

using F32 = Vec<float>;
using F64 = Vec<double>;

struct U32 {
    uint32_t x;

    FUSEDSTEP_INLINE explicit U32(uint32_t value = 0) : x(value) {}

    template <class Item>
    FUSEDSTEP_INLINE static U32 load(const Item* from) {
        return U32(static_cast<uint32_t>(*from));
    }
    FUSEDSTEP_INLINE void store(uint32_t* to) const { *to = x; }
    template <class Item>
    FUSEDSTEP_INLINE static void store(Item* to, const U32 (&from)[4]) {
        for (int i = 0; i < 4; ++i) to[i] = static_cast<Item>(from[i].x);
    }
    FUSEDSTEP_INLINE static void store_bytes(uint8_t* to, const U32 (&from)[4], int bits) {
        for (int i = 0; i < 4; ++i) to[i] = static_cast<uint8_t>(unsigned_byte(from[i].x, bits));
    }
    FUSEDSTEP_INLINE static void store_bytes(int8_t* to, const U32 (&from)[4], int bits) {
        for (int i = 0; i < 4; ++i) to[i] = static_cast<int8_t>(signed_byte(from[i].x, bits));
    }
    FUSEDSTEP_INLINE static U32 lane_numbers() { return U32(0); }
    FUSEDSTEP_INLINE U32 greatest() const { return *this; }
    FUSEDSTEP_INLINE uint32_t first() const { return x; }

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

// The first, unless it is a NaN.
FUSEDSTEP_INLINE F32 number_or(F32 a, F32 b) { return a.x == a.x ? a : b; }

FUSEDSTEP_INLINE bool any_nan(const F32 (&values)[4]) {
    return values[0].x != values[0].x || values[1].x != values[1].x || values[2].x != values[2].x ||
           values[3].x != values[3].x;
}

FUSEDSTEP_INLINE U32 bits_of(F32 value) {
    uint32_t bits;
    std::memcpy(&bits, &value.x, sizeof bits);
    return U32(bits);
}

FUSEDSTEP_INLINE F32 from_bits(U32 bits) {
    float value;
    std::memcpy(&value, &bits.x, sizeof value);
    return F32(value);
}

// In which items of 8 and 16 bits are read and written with the fewest instructions.
using OrderOfWords = Natural<F32>;

}  // namespace fusedstep::scalar
