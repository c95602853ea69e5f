// Inside a step, floating point is IEEE's default: round to nearest, denormals honoured, whatever the
// calling thread had set (some libraries turn flush-to-zero on). What it had comes back afterwards.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fusedstep::cpu {

class FloatEnvironment {
public:
    FloatEnvironment() : saved_(read()) {
        if (saved_ != ieee_default) write(ieee_default);
    }
    ~FloatEnvironment() {
        if (saved_ != ieee_default) write(saved_);
    }
    FloatEnvironment(const FloatEnvironment&) = delete;
    FloatEnvironment& operator=(const FloatEnvironment&) = delete;

private:
#if defined(__x86_64__)
    using Register = unsigned;
    static constexpr Register ieee_default = 0x1F80;
    // The exception flags (the low six bits) are no part of how numbers are computed.
    static Register read() { return _mm_getcsr() & ~0x3Fu; }
    static void write(Register value) { _mm_setcsr(value); }
#elif defined(__aarch64__)
    using Register = uint64_t;
    static constexpr Register ieee_default = 0;
    static Register read() {
        Register value;
        __asm__ volatile("mrs %0, fpcr" : "=r"(value));
        return value;
    }
    static void write(Register value) { __asm__ volatile("msr fpcr, %0" : : "r"(value)); }
#else
    using Register = int;
    static constexpr Register ieee_default = 0;
    static Register read() { return ieee_default; }
    static void write(Register) {}
#endif

    Register saved_;
};

}  // namespace fusedstep::cpu
