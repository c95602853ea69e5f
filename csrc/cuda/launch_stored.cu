// The kernels of tensors whose streams are not all in the type that the rule computes in.
#include "launch_stored.hpp"
#include "step_launch.cuh"

namespace fusedstep::cuda {
namespace {

template <class Rule>
void launch_rule(const Job& job, int device, cudaStream_t stream) {
    for_each_stored_placing(typename FastPlacings<Rule>::List{},
                            [&](auto placing) { launch_placed<Rule, float, decltype(placing)>(job, device, stream); });
}

template <class Rule>
void load_rule(int device) {
    for_each_stored_placing(typename FastPlacings<Rule>::List{},
                            [&](auto placing) { load_placed<Rule, float, decltype(placing)>(device); });
}

template <class... All>
const RuleFunctions& functions_in(RuleList<All...>, int rule) {
    static constexpr RuleFunctions functions[] = {{launch_rule<All>, load_rule<All>}...};
    return functions[rule];
}

}  // namespace

void launch_stored(const Job& job, int device, cudaStream_t stream) {
    functions_in(Rules{}, job.rule).launch(job, device, stream);
}

void load_stored(int rule, int device) { functions_in(Rules{}, rule).load(device); }

}  // namespace fusedstep::cuda
