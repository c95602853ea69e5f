// How a thread reads and writes the streams of a tensor that are not in the type that the rule computes in: the
// formats' own code, chosen when the kernel runs, or when it is compiled.
#pragma once

#include <type_traits>

#include "../core/format.hpp"
#include "../formats/bfloat16.hpp"
#include "../formats/eight_bit.hpp"
#include "../formats/float16.hpp"
#include "../formats/native.hpp"
#include "../formats/random.hpp"
#include "access.cuh"
#include "step_table.hpp"
#include "unroll.hpp"
#include "vec_cuda.hpp"

namespace fusedstep::cuda {

// The formats of a tensor's streams, and the bytes of their elements and of what is beside them.
class AnyFormats {
public:
    // Elements that a thread moves of each stream at once: as many as 8-bit formats have in 16 bytes.
    static constexpr int lanes = 16;

    FUSEDSTEP_INLINE AnyFormats(const StoredStreams& shared, int streams) : shared_(shared), streams_(streams) {}
    FUSEDSTEP_INLINE Format of(int k) const { return shared_.formats[k]; }
    FUSEDSTEP_INLINE int item(int k) const { return shared_.items[k]; }
    FUSEDSTEP_INLINE int extra(int k) const { return shared_.items[streams_ + k]; }
    FUSEDSTEP_INLINE bool in_blocks() const { return are_in_blocks(shared_.formats, streams_); }

private:
    const StoredStreams& shared_;
    const int streams_;
};

// As constants, which device code may use where it may not call the function.
template <Format format>
constexpr FormatLayout layout_as_constant = layout_of(format);

template <Format... formats>
class FixedFormats {
public:
    // As many as the narrowest format has in 16 bytes.
    static constexpr int lanes = (layout_as_constant<formats>.blockwise || ...) ? 16 : 8;

    FUSEDSTEP_INLINE FixedFormats(const StoredStreams&, int) {}
    FUSEDSTEP_INLINE Format of(int k) const { return static_cast<Format>(at<static_cast<int>(formats)...>(k)); }
    FUSEDSTEP_INLINE int item(int k) const {
        return at<(layout_as_constant<formats>.item == 0 ? 4 : layout_as_constant<formats>.item)...>(k);
    }
    FUSEDSTEP_INLINE int extra(int k) const {
        return at<(layout_as_constant<formats>.blockwise ? 4 : layout_as_constant<formats>.extra)...>(k);
    }
    FUSEDSTEP_INLINE bool in_blocks() const { return (is_random(formats) || ...); }

private:
    template <int... values>
    FUSEDSTEP_INLINE static int at(int k) {
        int found = 0, i = 0;
        ((i++ == k ? void(found = values) : void()), ...);
        return found;
    }
};

template <class Placing>
struct FormatsOf;
template <>
struct FormatsOf<Stored> {
    using Type = AnyFormats;
};
template <Format... formats>
struct FormatsOf<StoredAs<formats...>> {
    using Type = FixedFormats<formats...>;
};

// Calls visit(an item of so many bytes).
template <class Visit>
FUSEDSTEP_INLINE void with_item(int bytes, const Visit& visit) {
    if (bytes == 4)
        visit(uint32_t{});
    else if (bytes == 2)
        visit(uint16_t{});
    else
        visit(uint8_t{});
}

template <int lanes>
FUSEDSTEP_INLINE void items_in(int bytes, const uint32_t (&words)[lanes], uint32_t (&items)[lanes]) {
    with_item(bytes, [&](auto item) {
        FUSEDSTEP_UNROLL
        for (int i = 0; i < lanes; ++i) items[i] = item_in<decltype(item)>(words, i);
    });
}

template <int lanes>
FUSEDSTEP_INLINE void put_items_in(int bytes, uint32_t (&words)[lanes], const uint32_t (&items)[lanes]) {
    with_item(bytes, [&](auto item) {
        FUSEDSTEP_UNROLL
        for (int i = 0; i < lanes; ++i) put_item_in<decltype(item)>(words, i, items[i]);
    });
}

template <class F, int lanes>
FUSEDSTEP_INLINE void decode_as(const uint32_t (&items)[lanes], const uint32_t (&extras)[lanes],
                                Vec<float> (&values)[lanes]) {
    FUSEDSTEP_UNROLL
    for (int i = 0; i < lanes; ++i) {
        if constexpr (std::is_void_v<typename F::Extra>)
            values[i] = F::template decode<Vec<float>>(U32(items[i]));
        else
            values[i] = F::template decode<Vec<float>>(
                U32(items[i]), U32(static_cast<uint32_t>(static_cast<typename F::Extra>(extras[i]))));
    }
}

template <class Moment, int lanes>
FUSEDSTEP_INLINE void decode_codes(const uint32_t (&codes)[lanes], float unit, Vec<float> (&values)[lanes]) {
    const Vec<float> block_unit = unit_of(Vec<float>(unit));
    FUSEDSTEP_UNROLL
    for (int i = 0; i < lanes; ++i) {
        const auto code = static_cast<typename Moment::Item>(codes[i]);
        values[i] = Moment::template decode<Vec<float>>(U32(static_cast<uint32_t>(code)), block_unit);
    }
}

// What the items of stream k stand for: only some formats are for a parameter, for a gradient and for each moment.
template <int lanes>
FUSEDSTEP_INLINE void decode(int k, Format format, const uint32_t (&items)[lanes], const uint32_t (&extras)[lanes],
                             float unit, Vec<float> (&values)[lanes]) {
    if (format == Format::native) return decode_as<Native>(items, extras, values);
    if (k < 2 && format == Format::float16) return decode_as<Float16>(items, extras, values);
    if (k == 0) {
        if (format == Format::bfloat16_correction16) return decode_as<BFloat16Correction16>(items, extras, values);
        if (format == Format::bfloat16_correction8) return decode_as<BFloat16Correction8>(items, extras, values);
        if (format == Format::bfloat16_master || format == Format::float16_master)
            return decode_as<WithMaster<BFloat16>>(items, extras, values);
    }
    if (k == 2 && format == Format::signed8) return decode_codes<Signed8>(items, unit, values);
    if (k > 2 && format == Format::unsigned8) return decode_codes<Unsigned8>(items, unit, values);
    return decode_as<BFloat16>(items, extras, values);
}

// `first` is the number of the first element in its block of 64, `random` that block's random bits.
template <class F, int lanes>
FUSEDSTEP_INLINE void encode_as(const Vec<float> (&values)[lanes], uint64_t random, int first, uint32_t (&items)[lanes],
                                uint32_t (&extras)[lanes]) {
    FUSEDSTEP_UNROLL
    for (int i = 0; i < lanes; ++i) {
        U32 item, extra, bits;
        if constexpr (F::random != 0)
            bits = random_bits<F::random>(static_cast<uint32_t>(random), U32(static_cast<uint32_t>(first + i)));
        F::template encode<true, Vec<float>>(values[i], bits, item, extra);
        items[i] = sizeof(typename F::Item) == 2 ? item.x >> 16 : item.x;
        if constexpr (!std::is_void_v<typename F::Extra>)
            extras[i] = sizeof(typename F::Extra) == 1 ? extra.x >> 8 ^ 0x80 : extra.x;
    }
}

template <class Moment, int lanes>
FUSEDSTEP_INLINE void encode_codes(const Vec<float> (&values)[lanes], uint64_t random, int first,
                                   const BlockScale<Vec<float>>& scale, bool coded, uint32_t (&codes)[lanes]) {
    FUSEDSTEP_UNROLL
    for (int i = 0; i < lanes; ++i) {
        const U32 rounding = rounding_of(static_cast<uint32_t>(random >> 32), U32(static_cast<uint32_t>(first + i)));
        const U32 bits = Moment::template encode<Vec<float>>(bits_of(values[i]), scale.reciprocal, rounding);
        codes[i] = coded ? Moment::code(bits.x) : 0;
    }
}

// Of a stream without blocks.
template <int lanes>
FUSEDSTEP_INLINE void encode(int k, Format format, const Vec<float> (&values)[lanes], uint64_t random, int first,
                             uint32_t (&items)[lanes], uint32_t (&extras)[lanes]) {
    if (format == Format::native) return encode_as<Native>(values, random, first, items, extras);
    if (k == 0) {
        switch (format) {
            case Format::float16:
                return encode_as<Float16>(values, random, first, items, extras);
            case Format::bfloat16_master:
                return encode_as<WithMaster<BFloat16>>(values, random, first, items, extras);
            case Format::float16_master:
                return encode_as<WithMaster<Float16>>(values, random, first, items, extras);
            case Format::bfloat16_correction16:
                return encode_as<BFloat16Correction16>(values, random, first, items, extras);
            case Format::bfloat16_correction8:
                return encode_as<BFloat16Correction8>(values, random, first, items, extras);
            case Format::bfloat16_stochastic:
                return encode_as<BFloat16Stochastic>(values, random, first, items, extras);
            default:
                break;
        }
    }
    return encode_as<BFloat16>(values, random, first, items, extras);
}

}  // namespace fusedstep::cuda
