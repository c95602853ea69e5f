// A parameter group whose step is counted on the GPU, so that a CUDA graph which holds a step can be replayed:
// the step's number, the learning rate and the scalars made of them are read from the GPU's memory.
#pragma once

#include <cstdint>

#include "../rules/hyper.hpp"
#include "dtype.hpp"
#include "loss_scaling.hpp"

namespace fusedstep {

template <class Hyper, class T>
struct ScalarsOf;
template <class T>
struct ScalarsOf<GdHyper, T> {
    using Type = GdScalars<T>;
};
template <class T>
struct ScalarsOf<AdamHyper, T> {
    using Type = AdamScalars<T>;
};

// In the GPU's memory, zero at first.
template <class Hyper>
struct GroupState {
    int64_t step;
    typename ScalarsOf<Hyper, float>::Type float32;
    typename ScalarsOf<Hyper, double>::Type float64;
    uint64_t random;      // the stream of the step's random bits
    NormOutcome outcome;  // of the loss scaling
};

// What one step needs to know of a group.
template <class Hyper>
struct GroupOnGpu {
    GroupState<Hyper>* state;
    const void* lr;  // in the GPU's memory; null: hyper.lr
    DType lr_dtype;
    Hyper hyper;
    uint64_t seed;
    const NormOutcome* norm;  // in the GPU's memory: whether there is a step; null: there is
    bool taken_back = false;  // the step that was begun last is not taken after all

    // In the GPU's memory: the step's number once more for each parameter, where PyTorch looks for it.
    float* counts = nullptr;
    int64_t parameters = 0;

    LossScaling loss_scaling{};  // whose outcome goes into the state
};

}  // namespace fusedstep
