// The loops over memory of the storage formats, in blocks of 64 elements: into float32 and back. They own no
// mathematics. `Elements` is a format in which every element stands for itself, `Blocks` one in which those
// of a block share a scale.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../core/format.hpp"
#include "../core/stream.hpp"
#include "../formats/eight_bit.hpp"
#include "../formats/random.hpp"
#include "../rules/inline.hpp"

namespace fusedstep {

// One stream's part of a block, in memory.
template <class Format, class V>
class Elements {
public:
    using Item = typename Format::Item;
    static constexpr bool has_extra = !std::is_void_v<typename Format::Extra>;
    static constexpr bool blockwise = false;
    static constexpr bool random = Format::random;
    using Extra = std::conditional_t<has_extra, typename Format::Extra, uint8_t>;
    using B = typename V::Bits;

    static constexpr size_t extra_bytes(int64_t count) { return has_extra ? count * sizeof(Extra) : 0; }

    // `at` is where the block begins.
    FUSEDSTEP_INLINE Elements(const Stream& stream, int64_t at)
        : items_(static_cast<Item*>(stream.items) + at),
          extras_(has_extra ? static_cast<Extra*>(stream.extras) + at : nullptr) {}

    FUSEDSTEP_INLINE V decode(int i) const {
        B extra;
        if constexpr (has_extra) extra = B::load(extras_ + i);
        return Format::template decode<V>(B::load(items_ + i), extra);
    }

    // Nothing to know of the other elements before one is encoded.
    FUSEDSTEP_INLINE void observe(V) {}
    FUSEDSTEP_INLINE void set_scale(uint64_t random) { start_ = static_cast<uint32_t>(random); }

    FUSEDSTEP_INLINE void encode(int i, const V (&values)[4]) const {
        if (any_nan(values)) {
            encode_four<true>(i, values);
        } else {
            encode_four<false>(i, values);
        }
    }

private:
    template <bool may_be_nan>
    FUSEDSTEP_INLINE void encode_four(int i, const V (&values)[4]) const {
        B items[4], extras[4];
        for (int u = 0; u < 4; ++u) {
            B bits;
            if constexpr (Format::random) {
                bits = random_bits(start_, B::lane_numbers() + B(i + u * V::lanes));
            }
            Format::template encode<may_be_nan, V>(values[u], bits, items[u], extras[u]);
        }
        B::store(items_ + i, items);
        if constexpr (has_extra) B::store(extras_ + i, extras);
    }

    Item* items_;
    Extra* extras_;
    uint32_t start_ = 0;
};

template <class Format, class V>
class Blocks {
public:
    using Item = typename Format::Item;
    static constexpr bool blockwise = true;
    static constexpr bool random = true;
    using B = typename V::Bits;

    static constexpr size_t extra_bytes(int64_t count) { return block_count(count) * sizeof(float); }

    FUSEDSTEP_INLINE Blocks(const Stream& stream, int64_t at)
        : codes_(static_cast<Item*>(stream.items) + at),
          unit_at_(static_cast<float*>(stream.extras) + at / block_elements),
          unit_(*unit_at_) {}

    FUSEDSTEP_INLINE V decode(int i) const { return Format::template decode<V>(B::load(codes_ + i), unit_); }

    // Every element is observed, and then the scale is set, before any is encoded.
    FUSEDSTEP_INLINE void observe(V value) { greatest_ = max(greatest_, magnitude(bits_of(value))); }

    FUSEDSTEP_INLINE void set_scale(uint64_t random) {
        start_ = static_cast<uint32_t>(random >> 32);
        const B greatest = greatest_.greatest();
        finite_ = is_finite_block(greatest.first());
        const BlockScale<V> scale = scale_of<Format>(from_bits(greatest));
        const uint32_t unit = finite_ ? bits_of(scale.unit).first() : nan_bits;
        std::memcpy(unit_at_, &unit, sizeof unit);
        reciprocal_ = scale.reciprocal;
    }

    FUSEDSTEP_INLINE void encode(int i, const V (&values)[4]) const {
        B codes[4];
        for (int u = 0; u < 4; ++u) {
            codes[u] = Format::template encode<V>(bits_of(values[u]), reciprocal_,
                                                  random_bits(start_, B::lane_numbers() + B(i + u * V::lanes)));
        }
        B::store(codes_ + i, codes);
        if (!finite_) std::memset(codes_ + i, 0, 4 * V::lanes);
    }

private:
    Item* codes_;
    float* unit_at_;
    V unit_, reciprocal_;
    B greatest_{0u};
    uint32_t start_;
    bool finite_;
};

// A copy of the first elements of a block, in memory that has room for all of it.
template <class Access>
class PartialBlock {
public:
    PartialBlock(const Stream& stream, int64_t at, int64_t count)
        : from_{static_cast<char*>(stream.items) + at * sizeof(typename Access::Item),
                static_cast<char*>(stream.extras) + Access::extra_bytes(at)},
          item_bytes_(count * sizeof(typename Access::Item)),
          extra_bytes_(Access::extra_bytes(count)) {
        std::memcpy(items_, from_.items, item_bytes_);
        if (extra_bytes_ != 0) std::memcpy(extras_, from_.extras, extra_bytes_);
    }

    void write_back() const {
        std::memcpy(from_.items, items_, item_bytes_);
        if (extra_bytes_ != 0) std::memcpy(from_.extras, extras_, extra_bytes_);
    }

    Stream stream() { return {items_, extras_}; }

private:
    alignas(64) char items_[block_elements * 4] = {};
    alignas(64) char extras_[block_elements * 4] = {};
    Stream from_;
    size_t item_bytes_, extra_bytes_;
};

template <class Access, class V>
FUSEDSTEP_INLINE void decode_block(const Access& block, float* values) {
    for (int i = 0; i < block_elements; i += V::lanes) block.decode(i).store(values + i);
}

template <class Access, class V>
FUSEDSTEP_INLINE void encode_block(Access&& block, const float* values, uint64_t random) {
    for (int i = 0; i < block_elements; i += V::lanes) block.observe(V::load(values + i));
    block.set_scale(random);
    for (int i = 0; i < block_elements; i += 4 * V::lanes) {
        V four[4];
        for (int u = 0; u < 4; ++u) four[u] = V::load(values + i + u * V::lanes);
        block.encode(i, four);
    }
}

// Elements [at, at + count), where `at` begins a block. `values` has room for whole blocks.
template <class Access, class V>
void decode_loop(const Stream& stream, int64_t at, int64_t count, float* values) {
    for (; count >= block_elements; at += block_elements, count -= block_elements, values += block_elements) {
        decode_block<Access, V>(Access(stream, at), values);
    }
    if (count == 0) return;
    PartialBlock<Access> part(stream, at, count);
    decode_block<Access, V>(Access(part.stream(), 0), values);
}

// `first_block` is the number of the first block in its tensor, which its random bits are drawn by.
template <class Access, class V>
void encode_loop(const Stream& stream, int64_t at, int64_t count, int64_t first_block, uint64_t random, float* values) {
    for (; count >= block_elements; at += block_elements, count -= block_elements, values += block_elements) {
        encode_block<Access, V>(Access(stream, at), values, random_block(random, first_block++));
    }
    if (count == 0) return;
    for (int64_t i = count; i < block_elements; ++i) values[i] = 0.0f;
    PartialBlock<Access> part(stream, at, count);
    encode_block<Access, V>(Access(part.stream(), 0), values, random_block(random, first_block));
    part.write_back();
}

}  // namespace fusedstep
