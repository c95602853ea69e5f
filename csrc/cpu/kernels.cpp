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

// How a format is accessed, by its name in the table of formats: a line for each.
template <Format format, class Order>
struct AccessOf;
template <class Order>
struct AccessOf<Format::native, Order> : std::common_type<Elements<Native, F32, Order>> {};
template <class Order>
struct AccessOf<Format::bfloat16, Order> : std::common_type<Elements<BFloat16, F32, Order>> {};
template <class Order>
struct AccessOf<Format::float16, Order> : std::common_type<Elements<Float16, F32, Order>> {};
template <class Order>
struct AccessOf<Format::bfloat16_master, Order> : std::common_type<Elements<WithMaster<BFloat16>, F32, Order>> {};
template <class Order>
struct AccessOf<Format::float16_master, Order> : std::common_type<Elements<WithMaster<Float16>, F32, Order>> {};
template <class Order>
struct AccessOf<Format::bfloat16_correction16, Order> : std::common_type<Elements<BFloat16Correction16, F32, Order>> {};
template <class Order>
struct AccessOf<Format::bfloat16_correction8, Order> : std::common_type<Elements<BFloat16Correction8, F32, Order>> {};
template <class Order>
struct AccessOf<Format::bfloat16_stochastic, Order> : std::common_type<Elements<BFloat16Stochastic, F32, Order>> {};
template <class Order>
struct AccessOf<Format::signed8, Order> : std::common_type<Blocks<Signed8, F32, Order>> {};
template <class Order>
struct AccessOf<Format::unsigned8, Order> : std::common_type<Blocks<Unsigned8, F32, Order>> {};

template <Format format, class Order = Natural<F32>>
using Access = typename AccessOf<format, Order>::type;

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

template <class... All>
constexpr KernelTable table_of(RuleList<All...>) {
    const KernelTable table{{{step_loop<All, F32>, step_loop<All, F64>}...},
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
