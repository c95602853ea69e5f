#include "thread_count.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace fusedstep::cpu {
namespace {

// A positive integer, or 0.
int positive(const char* text) {
    if (text == nullptr) return 0;
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    return end != text && *end == '\0' && value >= 1 && value <= most_threads ? static_cast<int>(value) : 0;
}

int affinity_count() {
#if defined(__linux__)
    // The kernel refuses a mask smaller than its own, so grow it until it fits.
    for (int cpus = 1024; cpus <= 1 << 20; cpus *= 4) {
        cpu_set_t* set = CPU_ALLOC(cpus);
        const size_t size = CPU_ALLOC_SIZE(cpus);
        const bool known = sched_getaffinity(0, size, set) == 0;
        const int count = known ? CPU_COUNT_S(size, set) : 0;
        CPU_FREE(set);
        if (count > 0) return count;
    }
#endif
    return std::max(1u, std::thread::hardware_concurrency());
}

int rounded_up(double quota, double period) {
    return quota > 0 && period > 0 ? std::max(1, static_cast<int>(std::ceil(quota / period))) : 0;
}

// cgroup v2: "max 100000" or "150000 100000".
int version2_limit(const std::string& folder) {
    std::ifstream file(folder + "/cpu.max");
    std::string quota;
    double period = 0;
    if (!(file >> quota >> period) || quota == "max") return 0;
    return rounded_up(std::atof(quota.c_str()), period);
}

int version1_limit(const std::string& folder) {
    double quota = 0, period = 0;
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
    return rounded_up(quota, period);
}

}  // namespace

int cgroup_cpu_limit(const std::string& membership, const std::string& root) {
    int limit = 0;
    const auto lower = [&limit](int found) {
        if (found > 0) limit = limit == 0 ? found : std::min(limit, found);
    };
    std::ifstream file(membership);
    std::string line;
    while (std::getline(file, line)) {
        // hierarchy:controllers:path, e.g. "0::/user.slice" (v2) or "4:cpu,cpuacct:/docker/1234" (v1).
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        std::string path = line.substr(second + 1);
        std::istringstream names(controllers);
        std::string name;
        bool has_cpu = controllers.empty();
        while (std::getline(names, name, ',')) has_cpu = has_cpu || name == "cpu";
        if (!has_cpu) continue;
        // A limit of any ancestor holds too. In a container the path may not exist below the root that the
        // container sees, and then the root itself is the container's group.
        for (;;) {
            if (controllers.empty()) {
                lower(version2_limit(root + path));
            } else {
                lower(version1_limit(root + "/" + controllers + path));
                lower(version1_limit(root + "/cpu" + path));
            }
            if (path.empty() || path == "/") break;
            path.erase(path.rfind('/'));
        }
    }
    return limit;
}

ThreadCount default_thread_count() {
    if (const char* wanted = std::getenv("FUSEDSTEP_NUM_THREADS"); wanted != nullptr && *wanted != '\0') {
        if (const int count = positive(wanted)) return {count, "FUSEDSTEP_NUM_THREADS"};
        throw std::invalid_argument("FUSEDSTEP_NUM_THREADS: expected an integer from 1 to " +
                                    std::to_string(most_threads) + ", got '" + wanted + "'");
    }
    // OpenMP allows a list, one number for each level of nesting; it is not ours, so a bad one is ignored.
    if (const char* wanted = std::getenv("OMP_NUM_THREADS")) {
        const std::string list = wanted;
        if (const int count = positive(list.substr(0, list.find(',')).c_str())) return {count, "OMP_NUM_THREADS"};
    }
    const int affinity = affinity_count();
    const int quota = cgroup_cpu_limit("/proc/self/cgroup", "/sys/fs/cgroup");
    if (quota > 0 && quota < affinity) return {quota, "cgroup CPU quota"};
    return {std::min(affinity, most_threads), "CPU affinity"};
}

}  // namespace fusedstep::cpu
