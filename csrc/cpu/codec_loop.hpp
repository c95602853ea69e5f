// The loops over memory of the storage formats, in blocks of 64 elements: into float32 and back. They own no
// mathematics. `Elements` is a format in which every element stands for itself, `Blocks` one in which those
// of a block share a scale. The vectors of a block are numbered; an order says which elements are in each.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../core/format.hpp"
#include "../core/stream.hpp"
#include "../formats/eight_bit.hpp"
#include "../formats/native.hpp"
#include "../formats/random.hpp"
#include "../rules/inline.hpp"
#include "fetch_ahead.hpp"
#include "natural_order.hpp"

namespace fusedstep {

// A loop that computes much does not get far ahead by itself.
template <class Item>
FUSEDSTEP_INLINE void fetch_eighth_block(const Item* block) {
    fetch_ahead<block_elements, 8 * block_elements * sizeof(Item)>(block);
}

// One stream's part of a block, in memory.
template <class Format, class V, class Order = Natural<V>>
class Elements {
public:
    using Item = typename Format::Item;
    static constexpr bool has_extra = !std::is_void_v<typename Format::Extra>;
    static constexpr bool random = Format::random != 0;
    static constexpr bool native = std::is_same_v<Format, Native>;
    static constexpr bool blockwise = false;
    static constexpr bool nan_is_bfloat16 = Format::nan_is_bfloat16;
    using Extra = std::conditional_t<has_extra, typename Format::Extra, uint8_t>;
    using B = typename V::Bits;

    static constexpr size_t extra_bytes(int64_t count) { return has_extra ? count * sizeof(Extra) : 0; }

    // `at` is where the block begins.
    FUSEDSTEP_INLINE Elements(const Stream& stream, int64_t at)
        : items_(static_cast<Item*>(stream.items) + at),
          extras_(has_extra ? static_cast<Extra*>(stream.extras) + at : nullptr) {}

    FUSEDSTEP_INLINE V decode(int vector) const {
        const auto item = Order::load(items_, vector);
        if constexpr (has_extra)
            return Format::template decode<V>(item, Order::load(extras_, vector));
        else
            return Format::template decode<V>(item);
    }

    FUSEDSTEP_INLINE void write(int vector, V value) const {
        static_assert(native);
        Order::store(items_, vector, bits_of(value));
    }

    // What is the same for the elements of a block that are encoded. Nothing is to be known of the others before.
    struct Scale {
        uint32_t random;
    };
    FUSEDSTEP_INLINE void observe(V) {}
    FUSEDSTEP_INLINE Scale scale(uint64_t random) const { return {static_cast<uint32_t>(random)}; }

    // Four vectors from `vector` on.
    template <bool may_be_nan>
    FUSEDSTEP_INLINE void encode(int vector, const V (&values)[4], const Scale& scale) const {
        if (may_be_nan && any_nan(values)) {
            encode_four<true>(vector, values, scale);
        } else {
            encode_four<false>(vector, values, scale);
        }
    }
    FUSEDSTEP_INLINE void finish(const Scale&) const {}

    // The next block, and the one before.
    FUSEDSTEP_INLINE void advance() {
        move(block_elements);
        fetch_eighth_block(items_);
        if constexpr (has_extra) fetch_eighth_block(extras_);
    }
    FUSEDSTEP_INLINE Elements before() const {
        Elements copy = *this;
        copy.move(-block_elements);
        return copy;
    }

private:
    template <bool has_nan>
    FUSEDSTEP_INLINE void encode_four(int vector, const V (&values)[4], const Scale& scale) const {
        B items[4], extras[4];
        for (int u = 0; u < 4; ++u) {
            B bits;
            if constexpr (random) bits = random_bits<Format::random>(scale.random, Order::elements(vector + u));
            Format::template encode<has_nan, V>(values[u], bits, items[u], extras[u]);
        }
        if constexpr (sizeof(Item) == 2)
            Order::store_upper(items_, vector, items);
        else
            Order::store(items_, vector, items);
        if constexpr (has_extra) {
            auto* const block = reinterpret_cast<std::make_unsigned_t<Extra>*>(extras_);
            if constexpr (sizeof(Extra) == 1)
                Order::store_middle(block, vector, extras);
            else
                Order::store(block, vector, extras);
        }
    }

    FUSEDSTEP_INLINE void move(int64_t elements) {
        items_ += elements;
        if constexpr (has_extra) extras_ += elements;
    }

    Item* items_;
    Extra* extras_;
};

template <class Format, class V, class Order = Natural<V>>
class Blocks {
public:
    using Item = typename Format::Item;
    static constexpr bool random = true;
    static constexpr bool native = false;
    static constexpr bool blockwise = true;
    static constexpr bool nan_is_bfloat16 = true;
    using B = typename V::Bits;

    static constexpr size_t extra_bytes(int64_t count) { return block_count(count) * sizeof(float); }

    FUSEDSTEP_INLINE Blocks(const Stream& stream, int64_t at)
        : Blocks(static_cast<Item*>(stream.items) + at, static_cast<uint32_t*>(stream.extras) + at / block_elements) {
        read_unit();
    }

    FUSEDSTEP_INLINE V decode(int vector) const {
        return Format::template decode<V>(Order::load(codes_, vector), unit_);
    }

    struct Scale {
        V reciprocal;
        uint32_t random, greatest;
    };

    // Every element is observed before the scale is known, which replaces the old one.
    FUSEDSTEP_INLINE void observe(V value) { greatest_ = max(greatest_, Format::size(bits_of(value))); }
    FUSEDSTEP_INLINE Scale scale(uint64_t random) const {
        const uint32_t bits = greatest_.greatest().first();
        float greatest;
        std::memcpy(&greatest, &bits, sizeof(bits));
        const BlockScale<float> scale = scale_of<Format>(greatest);
        std::memcpy(unit_at_, &scale.unit, sizeof(scale.unit));
        return {V(scale.reciprocal), static_cast<uint32_t>(random >> 32), bits};
    }

    // The same, where what was observed is compared, and the unit and its reciprocal found, for two streams at once.
    struct Found {
        uint32_t greatest, unit;
        V reciprocal;
    };
    template <class Other>
    FUSEDSTEP_INLINE std::pair<Found, typename Other::Found> scales_of_both(const Other& other) const {
        const auto top = greatest(greatest_, other.greatest_);
        using Pair = std::remove_const_t<decltype(top)>;
        const BlockScale<Pair> scale = scale_of(top, Pair(Blocks::inverse_span, Other::inverse_span));
        return {{top.first_bits(), scale.unit.first_bits(), V::first_of(scale.reciprocal)},
                {top.second_bits(), scale.unit.second_bits(), V::second_of(scale.reciprocal)}};
    }
    FUSEDSTEP_INLINE Scale scale(uint64_t random, const Found& found) const {
        *unit_at_ = found.unit;
        return {found.reciprocal, static_cast<uint32_t>(random >> 32), found.greatest};
    }

    template <bool>
    FUSEDSTEP_INLINE void encode(int vector, const V (&values)[4], const Scale& scale) const {
        B codes[4];
        for (int u = 0; u < 4; ++u) {
            codes[u] = Format::template encode<V>(bits_of(values[u]), scale.reciprocal,
                                                  rounding_of(scale.random, Order::elements(vector + u)));
        }
        Order::template store_bytes<dropped_bits>(codes_, vector, codes);
    }

    // After all of the block has been encoded.
    FUSEDSTEP_INLINE void finish(const Scale& scale) const {
        if (has_codes(scale.greatest)) return;
        std::memset(codes_, 0, block_elements);
        *unit_at_ = unit_without_codes(scale.greatest);
    }

    FUSEDSTEP_INLINE void advance() {
        *this = Blocks(codes_ + block_elements, unit_at_ + 1);
        read_unit();
        fetch_eighth_block(codes_);
        fetch_ahead<1, cache_line>(unit_at_);
    }
    FUSEDSTEP_INLINE Blocks before() const { return Blocks(codes_ - block_elements, unit_at_ - 1); }

private:
    template <class, class, class>
    friend class Blocks;
    static constexpr float inverse_span = Format::inverse_span;

    FUSEDSTEP_INLINE Blocks(Item* codes, uint32_t* unit_at) : codes_(codes), unit_at_(unit_at) {}
    FUSEDSTEP_INLINE void read_unit() { unit_ = unit_of(from_bits(B(*unit_at_))); }

    Item* codes_;
    uint32_t* unit_at_;
    V unit_;
    B greatest_{0u};
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
    for (int vector = 0; vector < block_elements / V::lanes; ++vector) {
        block.decode(vector).store(values + vector * V::lanes);
    }
}

template <class Access, class V>
FUSEDSTEP_INLINE void encode_block(Access&& block, const float* values, uint64_t random) {
    for (int i = 0; i < block_elements; i += V::lanes) block.observe(V::load(values + i));
    const auto scale = block.scale(random);
    for (int vector = 0; vector < block_elements / V::lanes; vector += 4) {
        V four[4];
        for (int u = 0; u < 4; ++u) four[u] = V::load(values + (vector + u) * V::lanes);
        block.template encode<true>(vector, four, scale);
    }
    block.finish(scale);
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
