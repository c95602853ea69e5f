// Random jobs, stepped by the CUDA kernels' own source on the host and by the scalar CPU kernels: the same
// bits in all memory, that between and around the tensors too. To be compiled with csrc/cpu/kernels.cpp, and
// with alignment checked: a processor forgives a 16-byte access that a GPU does not.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cpu/kernels.hpp"
#include "../../csrc/cuda/step_kernel.cuh"
#include "random_numbers.hpp"

namespace fusedstep {
namespace {

struct Seen {
    int64_t jobs = 0, tensors = 0, elements = 0, tables = 0, small_tables = 0, split_jobs = 0;
};

template <class Rule, class T>
class Trial {
public:
    using Scalars = typename Rule::template Scalars<T>;

    explicit Trial(Random& random) : random_(random) {}

    bool run(Seen& seen) {
        choose_scalars();
        choose_tensors();
        step_on_cpu();
        const int64_t tables_before = seen.tables;
        step_as_on_gpu(seen);
        ++seen.jobs;
        seen.tensors += static_cast<int64_t>(sizes_.size());
        seen.split_jobs += seen.tables > tables_before + 1;
        for (const int64_t size : sizes_) seen.elements += size;
        if (!same_memory()) return false;
        // A step that is skipped clears the gradients, and nothing else.
        for (const Tensor& tensor : tensors_in(cpu_))
            std::fill_n(static_cast<T*>(tensor.streams[gradient_stream]), tensor.size, T(0));
        const NormOutcome skipped{0, 0, true};
        step_as_on_gpu(seen, &skipped);
        return same_memory();
    }

private:
    // Elements between tensors: more than a pack of any type.
    static constexpr int64_t margin = 8;
    static constexpr int64_t line = 64 / sizeof(T);

    void choose_scalars() {
        scalars_.resize(1 + below(random_, 4));
        for (Scalars& scalars : scalars_) {
            std::memset(&scalars, 0, sizeof(Scalars));
            randomise(scalars, random_);
        }
    }

    // Few long tensors, or many short ones: each job is a few ten thousand elements at the most.
    void choose_tensors() {
        struct Shape {
            int64_t most, longest;
        };
        constexpr Shape shapes[] = {{12, 5}, {12, 70}, {300, 20}, {4, 5000}, {300, 70}, {2000, 5}, {2, 40000}};
        // The first shapes often, the last seldom.
        const Shape shape = shapes[std::min(below(random_, 7), below(random_, 7))];
        const int64_t count = 1 + below(random_, shape.most);
        const int64_t scalars_in_turn = below(random_, 2);
        int64_t at = 0, scalars = 0;
        for (int64_t i = 0; i < count; ++i) {
            const bool alike = below(random_, 4) != 0;
            const int64_t offset = below(random_, line);
            sizes_.push_back(below(random_, shape.longest + 1));
            for (int k = 0; k < Rule::streams; ++k) {
                at = (at + margin + line - 1) / line * line + (alike ? offset : below(random_, line));
                begins_.push_back(at);
                at += sizes_.back();
            }
            if (scalars_in_turn || below(random_, 50) == 0) scalars = below(random_, scalars_.size());
            chosen_.push_back(scalars);
        }
        gpu_.resize(at + margin + line);
        for (T& x : gpu_) x = number<T>(random_);
        for (int64_t i = 0; i < count; ++i) {
            for (int k = 0; k < Rule::streams; ++k) {
                T* const x = gpu_.data() + base(gpu_) + begins_[i * Rule::streams + k];
                for (int64_t j = 0; j < sizes_[i]; ++j) {
                    if (below(random_, 100) == 0) x[j] = special<T>(random_);
                    if (k >= 3) x[j] = std::fabs(x[j]);  // second moments
                }
            }
        }
        // Equal contents, at equal distances from 64-byte boundaries.
        cpu_.resize(gpu_.size());
        std::copy_n(gpu_.data() + base(gpu_), at + margin, cpu_.data() + base(cpu_));
    }

    static int64_t base(const std::vector<T>& memory) {
        return static_cast<int64_t>((64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / sizeof(T));
    }

    std::vector<Tensor> tensors_in(std::vector<T>& memory) {
        std::vector<Tensor> tensors;
        for (size_t i = 0; i < sizes_.size(); ++i) {
            Tensor tensor{};
            for (int k = 0; k < Rule::streams; ++k)
                tensor.streams[k] = memory.data() + base(memory) + begins_[i * Rule::streams + k];
            tensor.size = sizes_[i];
            tensor.scalars = &scalars_[chosen_[i]];
            tensors.push_back(tensor);
        }
        return tensors;
    }

    void step_on_cpu() {
        const StepKernel step = scalar::kernels.step[0][rule_index<Rule>][sizeof(T) == 8];
        for (const Tensor& tensor : tensors_in(cpu_)) step(tensor.streams.data(), 0, tensor.size, tensor.scalars);
    }

    void step_as_on_gpu(Seen& seen, const NormOutcome* norm = nullptr) {
        const std::vector<Tensor> tensors = tensors_in(gpu_);
        std::vector<int64_t> ends;
        for (const int64_t size : sizes_) ends.push_back(size + (ends.empty() ? 0 : ends.back()));
        Job job{rule_index<Rule>,
                sizeof(T) == 8 ? DType::float64 : DType::float32,
                tensors.data(),
                ends.data(),
                static_cast<int64_t>(tensors.size()),
                false};
        job.norm = norm;
        job.zero_grad = norm != nullptr;
        constexpr int block_sizes[] = {32, 96, 256};
        const int threads = block_sizes[below(random_, 3)];
        const uint32_t most_blocks = static_cast<uint32_t>(below(random_, 2) ? 1 + below(random_, 7) : 1 << 20);
        cuda::for_each_table<Rule, T, cuda::Dense>(job, [&](const auto& table) {
            ++seen.tables;
            seen.small_tables += sizeof(table) == sizeof(cuda::SmallTable);
            const uint32_t blocks = std::min(table.chunks, most_blocks);
            for (uint32_t block = 0; block < blocks; ++block) {
                for (int thread = 0; thread < threads; ++thread)
                    cuda::step_table<Rule, T, cuda::Dense>(table, {block, blocks, thread, threads}, cuda::Alone{});
            }
        });
    }

    // There are no NaNs between tensors; in them, payloads are outside the promise.
    bool same_memory() const {
        const T* const gpu = gpu_.data() + base(gpu_);
        const T* const cpu = cpu_.data() + base(cpu_);
        const int64_t length = static_cast<int64_t>(gpu_.size()) - line;
        for (int64_t i = 0; i < length; ++i) {
            if (std::memcmp(gpu + i, cpu + i, sizeof(T)) == 0 || (gpu[i] != gpu[i] && cpu[i] != cpu[i])) continue;
            const int64_t after = std::upper_bound(begins_.begin(), begins_.end(), i) - begins_.begin() - 1;
            std::printf("rule %d, float%d: ", rule_index<Rule>, static_cast<int>(8 * sizeof(T)));
            if (after < 0)
                std::printf("before all tensors");
            else
                std::printf("tensor %d of %d, stream %d, element %lld of %lld", static_cast<int>(after / Rule::streams),
                            static_cast<int>(sizes_.size()), static_cast<int>(after % Rule::streams),
                            static_cast<long long>(i - begins_[after]),
                            static_cast<long long>(sizes_[after / Rule::streams]));
            std::printf(": %.17g, not %.17g\n", static_cast<double>(gpu[i]), static_cast<double>(cpu[i]));
            return false;
        }
        return true;
    }

    Random& random_;
    std::vector<Scalars> scalars_;
    std::vector<int64_t> sizes_, begins_, chosen_;  // begins_: of every stream of every tensor
    std::vector<T> gpu_, cpu_;
};

// A tensor of more than 2^32 elements of which only the last chunk is there, and only that is stepped.
template <class T>
bool last_chunk_of_a_huge_tensor(int64_t offset, bool alike) {
    constexpr int64_t size = (int64_t{1} << 33) + 12345, present = 3 * cuda::chunk_elements<T>;
    std::vector<T> memory[2][2];
    GdScalars<T> scalars{};
    scalars.grad_scale = 1;
    scalars.neg_lr = T(-0.5);
    Tensor tensors[2] = {};
    for (int which = 0; which < 2; ++which) {
        for (int k = 0; k < 2; ++k) {
            memory[which][k].assign(present + 64, T(k + 1));
            const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory[which][k].data()) + 63) / 64 * 64 +
                                    sizeof(T) * (offset + (alike ? 0 : k));
            tensors[which].streams[k] = reinterpret_cast<void*>(begin - sizeof(T) * (size - present));
        }
        tensors[which].size = size;
        tensors[which].scalars = &scalars;
    }
    const Job job{rule_index<Gd>, sizeof(T) == 8 ? DType::float64 : DType::float32, &tensors[0], &size, 1, false};
    int64_t begin = 0;
    cuda::for_each_table<Gd, T, cuda::Dense>(job, [&](const auto& table) {
        const int64_t lead = reinterpret_cast<uintptr_t>(tensors[0].streams[0]) % cuda::pack_bytes / sizeof(T);
        begin = int64_t{table.chunks - 1} * cuda::chunk_elements<T> - lead;
        for (int thread = 0; thread < 256; ++thread)
            cuda::step_table<Gd, T, cuda::Dense>(table, {table.chunks - 1, table.chunks, thread, 256}, cuda::Alone{});
    });
    scalar::kernels.step[0][rule_index<Gd>][sizeof(T) == 8](tensors[1].streams.data(), begin, size - begin, &scalars);
    bool same = begin > 0 && begin < size;
    for (int k = 0; k < 2; ++k) {
        const T* const last[] = {static_cast<const T*>(tensors[0].streams[k]) + (size - present),
                                 static_cast<const T*>(tensors[1].streams[k]) + (size - present)};
        same = same && std::equal(last[0], last[0] + present + 8, last[1]);
    }
    if (!same)
        std::printf("huge tensor of float%d, offset %d\n", static_cast<int>(8 * sizeof(T)), static_cast<int>(offset));
    return same;
}

template <class T>
bool huge_tensors() {
    for (int64_t offset = 0; offset < 5; ++offset) {
        if (!last_chunk_of_a_huge_tensor<T>(offset, true) || !last_chunk_of_a_huge_tensor<T>(offset, false))
            return false;
    }
    return true;
}

// Tensors all over 64 GiB of addresses: a table holds distances, which reach 8 GiB either way.
template <class T>
bool tensors_far_apart(Random& random) {
    constexpr int64_t region = int64_t{1} << 36, count = 40, size = 100;
    void* const memory =
        mmap(nullptr, region, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    AdamScalars<T> scalars{};
    randomise(scalars, random);
    std::vector<Tensor> tensors;
    std::vector<int64_t> ends;
    std::vector<T> expected[4];
    for (int64_t i = 0; i < count; ++i) {
        Tensor tensor{};
        tensor.size = size;
        tensor.scalars = &scalars;
        for (int k = 0; k < 4; ++k) {
            // A part of the region for each, so that none overlap.
            const int64_t part = region / (4 * count);
            const int64_t at = (4 * i + k) * part + below(random, part / 2);
            T* const x = reinterpret_cast<T*>(static_cast<char*>(memory) + at / 64 * 64) + below(random, 3);
            for (int64_t j = 0; j < size; ++j) {
                x[j] = static_cast<T>(between(random, 0, 1));
                expected[k].push_back(x[j]);
            }
            tensor.streams[k] = x;
        }
        tensors.push_back(tensor);
        ends.push_back((i + 1) * size);
    }
    std::shuffle(tensors.begin(), tensors.end(), Random(random));
    void* streams[] = {expected[0].data(), expected[1].data(), expected[2].data(), expected[3].data()};
    const DType dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
    scalar::kernels.step[0][rule_index<Adam>][static_cast<int>(dtype)](streams, 0, count * size, &scalars);
    const Job job{rule_index<Adam>, dtype, tensors.data(), ends.data(), count, false};
    cuda::for_each_table<Adam, T, cuda::Dense>(job, [](const auto& table) {
        for (int thread = 0; thread < 32; ++thread)
            cuda::step_table<Adam, T, cuda::Dense>(table, {0, 1, thread, 32}, cuda::Alone{});
    });
    std::sort(tensors.begin(), tensors.end(),
              [](const Tensor& a, const Tensor& b) { return a.streams[0] < b.streams[0]; });
    bool same = true;
    for (int64_t i = 0; i < count; ++i) {
        for (int k = 0; k < 4; ++k) {
            same = same && std::memcmp(tensors[i].streams[k], expected[k].data() + i * size, size * sizeof(T)) == 0;
        }
    }
    munmap(memory, region);
    if (!same) std::printf("tensors far apart, float%d\n", static_cast<int>(8 * sizeof(T)));
    return same;
}

template <class... All>
bool one_job_of_each(RuleList<All...>, Random& random, Seen& seen) {
    return ((Trial<All, float>(random).run(seen) && Trial<All, double>(random).run(seen)) && ...);
}

}  // namespace
}  // namespace fusedstep

int main(int count, char** arguments) {
    using namespace fusedstep;
    if (count != 3) return 2;
    Random random(std::strtoull(arguments[1], nullptr, 10));
    const int64_t rounds = std::strtoll(arguments[2], nullptr, 10);
    if (!huge_tensors<float>() || !huge_tensors<double>()) return 1;
    if (!tensors_far_apart<float>(random) || !tensors_far_apart<double>(random)) return 1;
    Seen seen;
    for (int64_t i = 0; i < rounds; ++i) {
        if (!one_job_of_each(Rules{}, random, seen)) {
            std::printf("in round %lld\n", static_cast<long long>(i));
            return 1;
        }
    }
    const long long numbers[] = {seen.jobs,   seen.tensors,      seen.elements,
                                 seen.tables, seen.small_tables, seen.split_jobs};
    const char* const names[] = {"jobs", "tensors", "elements", "tables", "small_tables", "split_jobs"};
    for (int i = 0; i < 6; ++i) std::printf("%s=%lld\n", names[i], numbers[i]);
}
