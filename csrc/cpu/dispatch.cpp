#include "dispatch.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fusedstep::cpu {
namespace {

std::vector<Isa> detect() {
    std::vector<Isa> isas{{"scalar", &scalar::kernels, true}};
#if defined(FUSEDSTEP_X86_KERNELS)
    // These builtins also ask the operating system whether it saves the wide registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    isas.push_back({"avx2", &avx2::kernels, avx2});
    isas.push_back({"avx512", &avx512::kernels, avx512});
#endif
    return isas;
}

bool detect_intel() {
#if defined(FUSEDSTEP_X86_KERNELS)
    __builtin_cpu_init();
    return __builtin_cpu_is("intel") != 0;
#else
    return false;
#endif
}

std::atomic<bool> intel{detect_intel()};

enum class Origin { best, environment, call };

std::atomic<const Isa*> chosen{nullptr};
std::atomic<Origin> origin{Origin::best};

const Isa& find(const std::string& wanted, const std::string& source) {
    std::string usable;
    for (const Isa& isa : built_isas()) {
        if (isa.supported) {
            if (isa.name == wanted) return isa;
            usable += (usable.empty() ? "" : ", ") + std::string(isa.name);
        }
    }
    for (const Isa& isa : built_isas()) {
        if (isa.name == wanted) {
            throw std::invalid_argument(source + ": this processor does not support '" + wanted + "'; use one of " +
                                        usable);
        }
    }
    throw std::invalid_argument(source + ": '" + wanted + "' is not an instruction set of this build; use one of " +
                                usable);
}

}  // namespace

const std::vector<Isa>& built_isas() {
    static const std::vector<Isa> isas = detect();
    return isas;
}

const Isa& chosen_isa() {
    const Isa* isa = chosen.load(std::memory_order_acquire);
    if (isa != nullptr) return *isa;
    if (const char* wanted = std::getenv("FUSEDSTEP_ISA"); wanted != nullptr && *wanted != '\0') {
        isa = &find(wanted, "FUSEDSTEP_ISA");
        origin = Origin::environment;
    } else {
        for (const Isa& candidate : built_isas()) {
            if (candidate.supported) isa = &candidate;
        }
    }
    chosen.store(isa, std::memory_order_release);
    return *isa;
}

std::string chosen_isa_reason() {
    chosen_isa();
    switch (origin.load()) {
        case Origin::environment:
            return "FUSEDSTEP_ISA";
        case Origin::call:
            return "set_isa";
        default:
            return "the best that this processor supports";
    }
}

void choose_isa(const std::string& name) {
    chosen.store(&find(name, "isa"), std::memory_order_release);
    origin = Origin::call;
}

bool made_by_intel() { return intel.load(std::memory_order_relaxed); }

void set_made_by_intel(bool value) { intel.store(value, std::memory_order_relaxed); }

}  // namespace fusedstep::cpu
