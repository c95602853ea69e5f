// Compiled once per instruction set, with FUSEDSTEP_ISA naming it. Everything here is inlined, or a
// template over that ISA's vector types, so no two of these objects share a symbol.
#include "kernels.hpp"

#include <iterator>
#include <type_traits>
#include <utility>

#include "../formats/bfloat16.hpp"
#include "../formats/eight_bit.hpp"
#include "../formats/float16.hpp"
#include "../formats/native.hpp"
#include "careful.hpp"
#include "codec_loop.hpp"
#include "fused_loop.hpp"
#include "norm_loop.hpp"
#include "step_loop.hpp"

#define FUSEDSTEP_STRINGIZE(x) #x
#define FUSEDSTEP_HEADER(isa) FUSEDSTEP_STRINGIZE(vec_##isa.hpp)
#define FUSEDSTEP_VEC_HEADER(isa) FUSEDSTEP_HEADER(isa)
#include FUSEDSTEP_VEC_HEADER(FUSEDSTEP_ISA)

namespace fusedstep::FUSEDSTEP_ISA {
namespace {

// The mathematics of a format, by its name in the table of formats: a line for each.
template <Format format>
struct FormatOf;
template <>
struct FormatOf<Format::native> : std::common_type<Native> {};
template <>
struct FormatOf<Format::bfloat16> : std::common_type<BFloat16> {};
template <>
struct FormatOf<Format::float16> : std::common_type<Float16> {};
template <>
struct FormatOf<Format::bfloat16_master> : std::common_type<WithMaster<BFloat16>> {};
template <>
struct FormatOf<Format::float16_master> : std::common_type<WithMaster<Float16>> {};
template <>
struct FormatOf<Format::bfloat16_correction16> : std::common_type<BFloat16Correction16> {};
template <>
struct FormatOf<Format::bfloat16_correction8> : std::common_type<BFloat16Correction8> {};
template <>
struct FormatOf<Format::bfloat16_stochastic> : std::common_type<BFloat16Stochastic> {};
template <>
struct FormatOf<Format::signed8> : std::common_type<Signed8> {};
template <>
struct FormatOf<Format::unsigned8> : std::common_type<Unsigned8> {};

template <class F, bool blockwise, class Order>
struct AccessOf : std::common_type<Elements<F, F32, Order>> {};
template <class F, class Order>
struct AccessOf<F, true, Order> : std::common_type<Blocks<F, F32, Order>> {};

template <Format format, class Order = Natural<F32>>
using Access = typename AccessOf<typename FormatOf<format>::type, layout_of(format).blockwise, Order>::type;

template <int... formats>
constexpr KernelTable with_codecs(KernelTable table, std::integer_sequence<int, formats...>) {
    ((table.codec[formats] = {decode_loop<Access<Format{formats}>, F32>, encode_loop<Access<Format{formats}>, F32>}),
     ...);
    return table;
}

// The order in which a fused step takes the elements of a block.
template <Format... formats>
using OrderOf = std::conditional_t<((formats == Format::native) || ...), Natural<F32>, OrderOfWords>;

template <class Rule, Format... formats>
constexpr FusedStep fused = {
    rule_index<Rule>, {formats...}, FusedLoop<Rule, F32, Access<formats, OrderOf<formats...>>...>::run};

constexpr FusedStep fused_steps[] = {
    fused<Adam, Format::native, Format::native, Format::signed8, Format::unsigned8>,
    fused<Adam, Format::bfloat16, Format::bfloat16, Format::bfloat16, Format::bfloat16>,
    fused<Adam, Format::bfloat16, Format::bfloat16, Format::native, Format::native>,
    fused<Adam, Format::bfloat16_correction8, Format::bfloat16, Format::signed8, Format::unsigned8>,
    fused<Adam, Format::bfloat16_stochastic, Format::bfloat16, Format::signed8, Format::unsigned8>,
};

template <class Rule>
constexpr StepKernel around_denormals() {
    if constexpr (F32::lanes == 1)
        return step_loop<Rule, F32, true>;
    else
        return step_loop_around_denormals<Rule, F32>;
}

template <class... All>
constexpr KernelTable table_of(RuleList<All...>) {
    const KernelTable table{{{{step_loop<All, F32, false>, step_loop<All, F64, false>}...},
                             {{around_denormals<All>(), step_loop<All, F64, true>}...}},
                            {},
                            fused_steps,
                            std::size(fused_steps),
                            {{add_squares_loop<F64, float>, add_squares_side_by_side<F64, float>},
                             {add_squares_loop<F64, double>, add_squares_side_by_side<F64, double>}}};
    return with_codecs(table, std::make_integer_sequence<int, format_count>());
}

}  // namespace

extern const KernelTable kernels = table_of(Rules{});

}  // namespace fusedstep::FUSEDSTEP_ISA
