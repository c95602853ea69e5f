// Random jobs of tensors that are not all native, stepped by the CUDA kernels' own source on the host and by the scalar
// CPU kernels, and the norm of their gradients: the same bits in all memory. Some of them by threads that run at the
// same time and exchange values, as those of a warp do. To be compiled with csrc/cpu/kernels.cpp and csrc/cpu/tile.cpp,
// and with alignment checked.
#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "../../csrc/cpu/tile.hpp"
#include "../../csrc/cuda/norm_kernel.cuh"
#include "../../csrc/cuda/step_kernel.cuh"
#include "../../csrc/formats/random.hpp"
#include "random_numbers.hpp"

namespace fusedstep {
namespace {

// A block of threads that run at the same time. Where one of them waits for others that do not come, so does the
// program.
class Block {
public:
    static constexpr int warps = 2, threads = 32 * warps;

    Block() {
        pthread_barrier_init(&all_, nullptr, threads);
        for (auto& barrier : of_warp_) pthread_barrier_init(&barrier, nullptr, 32);
    }
    ~Block() {
        pthread_barrier_destroy(&all_);
        for (auto& barrier : of_warp_) pthread_barrier_destroy(&barrier);
    }

    // What each thread of a warp is given.
    class Team {
    public:
        static constexpr int threads = 32;

        Team(Block& block, int thread) : block_(block), thread_(thread) {}

        template <class Value>
        Value exchange(Value value, int distance) const {
            return from(thread_ ^ distance, value);
        }
        template <int count, class Value>
        Value next(Value value) const {
            return from(thread_ / count * count + (thread_ + 1) % count, value);
        }
        void wait_for_block() const { pthread_barrier_wait(&block_.all_); }

    private:
        template <class Value>
        Value from(int thread, Value value) const {
            static_assert(sizeof(Value) <= sizeof(uint64_t));
            std::memcpy(&block_.values_[thread_], &value, sizeof value);
            pthread_barrier_wait(&block_.of_warp_[thread_ / 32]);
            std::memcpy(&value, &block_.values_[thread], sizeof value);
            pthread_barrier_wait(&block_.of_warp_[thread_ / 32]);
            return value;
        }

        Block& block_;
        const int thread_;
    };

    // Calls work(place, team) in each thread.
    template <class Work>
    void run(uint32_t block, uint32_t blocks, const Work& work) {
        std::vector<std::thread> running;
        for (int thread = 0; thread < threads; ++thread) {
            running.emplace_back(
                [&, thread] { work(cuda::Place{block, blocks, thread, threads}, Team(*this, thread)); });
        }
        for (std::thread& thread : running) thread.join();
    }

private:
    pthread_barrier_t all_, of_warp_[warps];
    uint64_t values_[threads];
};

// A grid: either the threads of a block run at the same time, or each works alone, one after the other.
struct Grid {
    bool at_once;
    uint32_t blocks;
    int threads;

    template <class Work>
    void run(const Work& work) const {
        for (uint32_t block = 0; block < blocks; ++block) {
            if (at_once) {
                Block().run(block, blocks, work);
                continue;
            }
            for (int thread = 0; thread < threads; ++thread)
                work(cuda::Place{block, blocks, thread, threads}, cuda::Alone{});
        }
    }
};

Grid any_grid(Random& random, bool at_once) {
    constexpr int block_sizes[] = {1, 32, 96};
    return {at_once, static_cast<uint32_t>(1 + below(random, 3)), block_sizes[below(random, 3)]};
}

bool same_number(double a, double b) { return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b); }

// The sum of squares as core/norm.hpp has it, and as the kernels add it.
bool same_norm(const std::vector<NormJob::Gradient>& gradients, Random& random, bool at_once) {
    std::vector<double> sums;
    int64_t blocks = 0;
    for (const auto& [tensor, dtype] : gradients) {
        std::vector<double> of_blocks;
        for (int64_t at = 0; at < tensor->size; at += norm_block) {
            double lanes[norm_lanes] = {};
            cpu::add_squares_of_gradient(scalar::kernels, dtype, *tensor, at, std::min(norm_block, tensor->size - at),
                                         lanes);
            of_blocks.push_back(sum_in_pairs(lanes, norm_lanes));
        }
        blocks += static_cast<int64_t>(of_blocks.size());
        sums.push_back(sum_in_pairs(of_blocks.data(), static_cast<int64_t>(of_blocks.size())));
    }
    const NormOptions options{0.75, below(random, 2) ? 1.5 : 0, below(random, 2) != 0};
    const NormOutcome expected = outcome_of(sum_in_pairs(sums.data(), static_cast<int64_t>(sums.size())), options);
    const auto count = static_cast<int64_t>(gradients.size());
    std::vector<double> workspace(norm_workspace_bytes(blocks, count) / sizeof(double));
    NormOutcome outcome{};
    const NormJob job{gradients.data(), count, workspace.data(), &outcome, options};
    Grid whole = any_grid(random, at_once);
    whole.threads = 1;  // a thread that works alone waits for no block
    const int64_t added = cuda::for_each_norm_table(job, [&](const auto& table) {
        any_grid(random, at_once).run([&](const cuda::Place& place, const auto& team) {
            cuda::sum_blocks(table, place, team);
        });
        whole.run([&](const cuda::Place& place, const auto& team) { cuda::sum_gradients(table, place, team); });
    });
    whole.blocks = 1;
    whole.run([&](const cuda::Place& place, const auto& team) {
        cuda::end_norm({job.workspace, added, job.outcome, job.options}, place, team);
    });
    const bool same = same_number(outcome.norm, expected.norm) &&
                      same_number(outcome.grad_scale, expected.grad_scale) && outcome.skipped == expected.skipped;
    if (!same) std::printf("norm: %.17g, not %.17g\n", outcome.norm, expected.norm);
    return same;
}

int item_bytes(Format format) { return layout_of(format).item == 0 ? 4 : layout_of(format).item; }

int64_t extra_bytes(Format format, int64_t count) {
    return layout_of(format).blockwise ? (count + block_elements - 1) / block_elements * 4
                                       : layout_of(format).extra * count;
}

struct Seen {
    int64_t jobs = 0, elements = 0, at_once = 0, fast = 0;
};

// Memory of several arrays, in which each begins at a multiple of its elements' size.
class Memory {
public:
    int64_t add(int64_t bytes, int item, int64_t offset) {
        const int64_t at = (size_ + 63) / 64 * 64 + offset * item;
        size_ = at + bytes + 64;
        return at;
    }
    std::vector<unsigned char> made() const { return std::vector<unsigned char>(size_ + 64); }
    static unsigned char* begin(std::vector<unsigned char>& memory) {
        return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    }

private:
    int64_t size_ = 0;
};

template <class Rule>
class Trial {
public:
    Trial(Random& random, bool at_once) : random_(random), at_once_(at_once) {}

    bool run(Seen& seen) {
        randomise(scalars_, random_);
        const int64_t count = at_once_ ? 1 + below(random_, 2) : 1 + below(random_, 9);
        for (int64_t i = 0; i < count; ++i) {
            // Often as the tensor before, so that they share a place in the table.
            storages_.push_back(i > 0 && below(random_, 3) != 0 ? storages_.back() : chosen_formats());
            const int64_t longest[] = {5, 70, 600, 5000};
            sizes_.push_back(1 + below(random_, longest[below(random_, at_once_ ? 3 : 4)]));
            // All arrays of a tensor as far from a boundary, some of them, or each by itself.
            const int64_t alike = below(random_, 3), common = below(random_, 16);
            const auto offset = [&] { return below(random_, 2) < alike ? common : below(random_, 16); };
            for (int k = 0; k < Rule::streams; ++k) {
                const FormatLayout layout = layout_of(storages_[i].formats[k]);
                const int item = item_bytes(storages_[i].formats[k]);
                places_.push_back(memory_.add(sizes_[i] * item, item, offset()));
                const int64_t extra = extra_bytes(storages_[i].formats[k], sizes_[i]);
                extra_places_.push_back(extra == 0 ? -1
                                                   : memory_.add(extra, layout.blockwise ? 4 : layout.extra, offset()));
            }
        }
        cpu_ = memory_.made();
        gpu_ = memory_.made();
        std::vector<Tensor> on_cpu = tensors_in(cpu_, cpu_storages_), on_gpu = tensors_in(gpu_, gpu_storages_);
        for (const Tensor& tensor : on_cpu) fill(tensor);
        std::memcpy(Memory::begin(gpu_), Memory::begin(cpu_), cpu_.size() - 64);
        std::vector<int64_t> ends;
        for (const int64_t size : sizes_) ends.push_back(size + (ends.empty() ? 0 : ends.back()));
        Job job{rule_index<Rule>, DType::float32, on_gpu.data(), ends.data(), count, false};
        for (Tensor& tensor : on_gpu) {
            seen.fast += cuda::any_holds(typename cuda::FastPlacings<Rule>::List{}, job.rule, tensor);
            seen.elements += tensor.size;
        }
        ++seen.jobs;
        seen.at_once += at_once_;
        std::vector<NormJob::Gradient> gradients;
        for (const Tensor& tensor : on_gpu) gradients.push_back({&tensor, DType::float32});
        if (!same_norm(gradients, random_, at_once_)) return false;
        for (int step = 0; step < 2; ++step) {  // the second reads what the first has written
            for (const Tensor& tensor : on_cpu) cpu::tiled_step(scalar::kernels, job, tensor, 0, tensor.size);
            step_as_on_gpu(job);
            if (!same_memory(on_cpu, on_gpu)) return false;
        }
        // A step that is skipped clears the gradients, and nothing else.
        for (const Tensor& tensor : on_cpu) {
            std::memset(tensor.streams[gradient_stream], 0,
                        tensor.size * item_bytes(tensor.storage->formats[gradient_stream]));
        }
        const NormOutcome skipped{0, 0, true};
        job.norm = &skipped;
        job.zero_grad = true;
        step_as_on_gpu(job);
        return same_memory(on_cpu, on_gpu);
    }

private:
    Storage chosen_formats() {
        constexpr Format parameters[] = {Format::native,
                                         Format::bfloat16,
                                         Format::float16,
                                         Format::bfloat16_master,
                                         Format::float16_master,
                                         Format::bfloat16_correction16,
                                         Format::bfloat16_correction8,
                                         Format::bfloat16_stochastic};
        constexpr Format gradients[] = {Format::native, Format::bfloat16, Format::float16};
        Storage storage;
        storage.random = random_();
        storage.formats[0] = parameters[below(random_, 8)];
        storage.formats[1] = gradients[below(random_, 3)];
        for (int k = 2; k < Rule::streams; ++k) {
            const Format moments[] = {Format::native, Format::bfloat16, k == 2 ? Format::signed8 : Format::unsigned8};
            storage.formats[k] = moments[below(random_, 3)];
        }
        if (Rule::streams == 4 && below(random_, 2)) {  // one of those that have kernels of their own
            using F = Format;
            constexpr Format fast[5][4] = {{F::native, F::native, F::signed8, F::unsigned8},
                                           {F::bfloat16, F::bfloat16, F::bfloat16, F::bfloat16},
                                           {F::bfloat16, F::bfloat16, F::native, F::native},
                                           {F::bfloat16_correction8, F::bfloat16, F::signed8, F::unsigned8},
                                           {F::bfloat16_stochastic, F::bfloat16, F::signed8, F::unsigned8}};
            std::copy_n(fast[below(random_, 5)], 4, storage.formats.begin());
        }
        return storage;
    }

    std::vector<Tensor> tensors_in(std::vector<unsigned char>& memory, std::vector<Storage>& storages) {
        storages = storages_;
        std::vector<Tensor> tensors;
        for (size_t i = 0; i < sizes_.size(); ++i) {
            Tensor tensor{};
            for (int k = 0; k < Rule::streams; ++k) {
                const size_t at = i * Rule::streams + k;
                tensor.streams[k] = Memory::begin(memory) + places_[at];
                if (extra_places_[at] >= 0) storages[i].extras[k] = Memory::begin(memory) + extra_places_[at];
            }
            tensor.size = sizes_[i];
            tensor.scalars = &scalars_;
            tensor.storage = &storages[i];
            tensors.push_back(tensor);
        }
        return tensors;
    }

    // Any values, encoded by the CPU.
    void fill(const Tensor& tensor) {
        for (int k = 0; k < Rule::streams; ++k) {
            std::vector<float> values((tensor.size + block_elements - 1) / block_elements * block_elements);
            for (int64_t i = 0; i < tensor.size; ++i) {
                values[i] = below(random_, 200) == 0 ? special<float>(random_) : number<float>(random_);
                if (k > 2) values[i] = std::fabs(values[i]);
            }
            const Format format = tensor.storage->formats[k];
            const Stream stream{tensor.streams[k], tensor.storage->extras[k]};
            scalar::kernels.codec[static_cast<int>(format)].encode(stream, 0, tensor.size, 0, random_(), values.data());
        }
    }

    void step_as_on_gpu(const Job& job) {
        cuda::for_each_stored_placing(typename cuda::FastPlacings<Rule>::List{}, [&](auto placing) {
            using Placing = decltype(placing);
            cuda::for_each_table<Rule, float, Placing>(job, [&](const auto& table) {
                any_grid(random_, at_once_).run([&](const cuda::Place& place, const auto& team) {
                    cuda::step_table<Rule, float, Placing>(table, place, team);
                });
            });
        });
    }

    // Whether an array has the same bits, but for NaN that are others, and so all memory beside them.
    bool same_memory(const std::vector<Tensor>& on_cpu, const std::vector<Tensor>& on_gpu) {
        for (size_t i = 0; i < on_cpu.size(); ++i) {
            for (int k = 0; k < Rule::streams; ++k) {
                forget_nans(on_cpu[i], k);
                forget_nans(on_gpu[i], k);
            }
        }
        const unsigned char* const cpu = Memory::begin(cpu_);
        const unsigned char* const gpu = Memory::begin(gpu_);
        const size_t bytes = cpu_.size() - 64;
        if (std::memcmp(cpu, gpu, bytes) == 0) return true;
        const int64_t at = std::mismatch(cpu, cpu + bytes, gpu).first - cpu;
        std::printf("rule %d, %s: byte %lld", rule_index<Rule>, at_once_ ? "at once" : "alone",
                    static_cast<long long>(at));
        for (size_t i = 0; i < places_.size(); ++i) {
            const Format format = storages_[i / Rule::streams].formats[i % Rule::streams];
            if (places_[i] <= at && at < places_[i] + sizes_[i / Rule::streams] * item_bytes(format))
                std::printf(": stream %d of format %d, element %lld of %lld", static_cast<int>(i % Rule::streams),
                            static_cast<int>(format), static_cast<long long>((at - places_[i]) / item_bytes(format)),
                            static_cast<long long>(sizes_[i / Rule::streams]));
        }
        std::printf("\n");
        return false;
    }

    // Makes every NaN of a stream the same.
    static void forget_nans(const Tensor& tensor, int k) {
        const Format format = tensor.storage->formats[k];
        if (layout_of(format).blockwise) return;
        for (int64_t i = 0; i < tensor.size; ++i) {
            if (item_bytes(format) == 4) {
                float& x = static_cast<float*>(tensor.streams[k])[i];
                if (x != x) x = std::numeric_limits<float>::quiet_NaN();
                continue;
            }
            uint16_t& item = static_cast<uint16_t*>(tensor.streams[k])[i];
            const bool is_half = format == Format::float16 || format == Format::float16_master;
            if ((item & 0x7FFF) <= (is_half ? 0x7C00 : 0x7F80)) continue;
            item = 0x7FFF;
            if (tensor.storage->extras[k] == nullptr) continue;
            const int bytes = layout_of(format).extra;
            std::memset(static_cast<char*>(tensor.storage->extras[k]) + i * bytes, 0, bytes);
        }
    }

    Random& random_;
    const bool at_once_;
    typename Rule::template Scalars<float> scalars_{};
    std::vector<Storage> storages_, cpu_storages_, gpu_storages_;
    std::vector<int64_t> sizes_, places_, extra_places_;
    Memory memory_;
    std::vector<unsigned char> cpu_, gpu_;
};

// Gradients of several blocks, of every type and at any offset, dense and strided.
bool same_norm_of_long_gradients(Random& random, bool at_once) {
    const int64_t count = 1 + below(random, 5);
    std::deque<std::vector<unsigned char>> memory;
    std::deque<Storage> storages;
    std::deque<StridedLayout> layouts;
    std::deque<Tensor> tensors;
    std::vector<NormJob::Gradient> gradients;
    for (int64_t i = 0; i < count; ++i) {
        constexpr DType dtypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};
        constexpr int64_t longest[] = {20, 5000, 40000};
        const DType dtype = dtypes[below(random, 4)];
        const int64_t item = item_size(dtype), size = 1 + below(random, longest[below(random, 3)]);
        const int64_t step = below(random, 4) == 0 ? 2 : 1;
        memory.emplace_back(64 + (16 + size * step) * item);
        unsigned char* const begin =
            memory.back().data() + (64 - reinterpret_cast<uintptr_t>(memory.back().data()) % 64) % 64;
        unsigned char* const first = begin + below(random, 16) * item;
        for (int64_t j = 0; j < size * step; ++j) {
            const float x = number<float>(random);
            const double wide = number<double>(random);
            const uint16_t upper = bits_of(cuda::Vec<float>(x)).x >> 16;
            const uint16_t half = random() & 0xBBFF;  // none that is not finite
            const void* const from = dtype == DType::float32    ? static_cast<const void*>(&x)
                                     : dtype == DType::float64  ? static_cast<const void*>(&wide)
                                     : dtype == DType::bfloat16 ? static_cast<const void*>(&upper)
                                                                : static_cast<const void*>(&half);
            std::memcpy(first + j * item, from, item);
        }
        Tensor& tensor = tensors.emplace_back();
        tensor.streams[gradient_stream] = first;
        tensor.size = size;
        if (item == 2) {
            tensor.storage = &storages.emplace_back();
            storages.back().formats[gradient_stream] = dtype == DType::bfloat16 ? Format::bfloat16 : Format::float16;
        }
        if (step != 1) {
            tensor.layout = &layouts.emplace_back();
            layouts.back().shape = {size};
            layouts.back().strides[gradient_stream] = {step * item};
        }
        gradients.push_back({&tensor, compute_type(dtype)});
    }
    return same_norm(gradients, random, at_once);
}

// As many values as take the threads of a block several rounds, which wait for each other between them.
bool same_sum_at_once(Random& random) {
    std::vector<double> values(1 + below(random, 5000));
    for (double& x : values) x = std::fabs(number<double>(random));
    std::vector<double> copy = values, spare(values.size());
    const double expected = sum_in_pairs(copy.data(), static_cast<int64_t>(copy.size()));
    const double* sums[Block::threads];
    Block().run(0, 1, [&](const cuda::Place& place, const auto& team) {
        sums[place.thread] =
            cuda::sum_by_block(values.data(), spare.data(), static_cast<int64_t>(values.size()), place, team);
    });
    const bool same = std::all_of(sums, sums + Block::threads, [&](const double* sum) { return *sum == expected; });
    if (!same) std::printf("the sum of %d values\n", static_cast<int>(values.size()));
    return same;
}

template <class... All>
bool one_job_of_each(RuleList<All...>, Random& random, bool at_once, Seen& seen) {
    return (Trial<All>(random, at_once).run(seen) && ...);
}

}  // namespace
}  // namespace fusedstep

int main(int count, char** arguments) {
    using namespace fusedstep;
    if (count != 4) return 2;
    Random random(std::strtoull(arguments[1], nullptr, 10));
    const int64_t rounds = std::strtoll(arguments[2], nullptr, 10);
    const int64_t at_once = std::strtoll(arguments[3], nullptr, 10);
    Seen seen;
    for (int64_t i = 0; i < rounds; ++i) {
        if (!one_job_of_each(Rules{}, random, i < at_once, seen) || !same_norm_of_long_gradients(random, i < at_once) ||
            (i < at_once && !same_sum_at_once(random))) {
            std::printf("in round %lld\n", static_cast<long long>(i));
            return 1;
        }
    }
    const long long numbers[] = {seen.jobs, seen.elements, seen.at_once, seen.fast};
    const char* const names[] = {"jobs", "elements", "at_once", "fast"};
    for (int i = 0; i < 4; ++i) std::printf("%s=%lld\n", names[i], numbers[i]);
}
