// How many threads a step may use, and why.
#pragma once

#include <string>

namespace fusedstep::cpu {

constexpr int most_threads = 1024;

struct ThreadCount {
    int count;
    std::string reason;
};

// FUSEDSTEP_NUM_THREADS, else OMP_NUM_THREADS, else the smaller of the CPU affinity and the cgroup quota.
// Throws std::invalid_argument when FUSEDSTEP_NUM_THREADS is not a positive integer.
ThreadCount default_thread_count();

// The CPUs that the cgroups of this process allow, rounded up; 0 when there is no limit. The arguments are
// /proc/self/cgroup and /sys/fs/cgroup, or a copy of them in a test.
int cgroup_cpu_limit(const std::string& membership, const std::string& root);

}  // namespace fusedstep::cpu
