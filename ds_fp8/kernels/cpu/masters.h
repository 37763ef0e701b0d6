// The master of one block: the 16-bit weight plus a remainder, or scaled fp16, or fp32. Reference:
// ds_fp8/numerics/masters.py, which has the table of formats and says why the remainder is made as it is.
#pragma once

#include "blocks16.h"

namespace {

// Keeps the low bits of each word.
INLINE void store_remainder(int16_t* to, Words v) { store(to, low_halves(v)); }
INLINE void store_remainder(int8_t* to, Words v) { store(to, low_bytes(v)); }

template <class R>
struct Remainder;
template <>
struct Remainder<int16_t> {
    typedef Shorts Vector;
    static constexpr int SHIFT = 15;  // of an fp16 base
};
template <>
struct Remainder<int8_t> {
    typedef Chars Vector;
    static constexpr int SHIFT = 7;
};

// What one step of the remainder of an fp16 weight means: ulp(weight) * 2^-SHIFT, as bits.
template <class R>
INLINE Words half_unit(Words weight) {
    Words field = larger((weight >> 10) & 0x1fu, splat(1u));
    return (field + uint32_t(127 - 25 - Remainder<R>::SHIFT)) << 23;
}

template <class R>
INLINE Floats join(bool bf16, Words weight, Words remainder) {
    if (bf16) {
        Words high = weight << 16;
        Words bits = high + (sizeof(R) == 2 ? remainder : remainder << 8);
        // A zero written in place, beside the negative remainder of what was there, would be NaN.
        return floats_of(floats_of(bits) == floats_of(bits) ? bits : high);
    }
    return half_to_float(narrow_to_halves(weight)) +
           __builtin_convertvector((Ints)remainder, Floats) * floats_of(half_unit<R>(weight));
}

struct Split {
    Words weight, remainder;
};

INLINE Split split_bf16_16(Floats master) {
    Words bits = bits_of(master);
    bits = master == master ? bits : splat(0x7fc00000u);
    Words weight = (bits + 0x8000u) >> 16;
    return {weight, bits - (weight << 16)};
}

// The remainder is the low byte of `remainder`. Infinity and the canonical NaN have zeros there, so that neither way of
// rounding reaches their upper bits.
INLINE Split split_bf16_8(Floats master, bool stochastic, Words random) {
    Words bits = bits_of(master);
    bits = master == master ? bits : splat(0x7fc00000u);
    bits += stochastic ? random >> 24 : splat(0x80u);
    return {(bits + 0x8000u) >> 16, bits >> 8};
}

template <class R>
INLINE Split split_fp16(Floats master, bool stochastic, Words random) {
    Words weight = widen(float_to_half(master));
    Words unit = half_unit<R>(weight);
    Floats quotient = (master - half_to_float(narrow_to_halves(weight))) * floats_of(splat(254u << 23) - unit);
    Ints remainder;
    if (stochastic) {
        remainder = floor_of(quotient + random_fraction<24>(random));
    } else {
        // Nearest even: adding 1.5 * 2^23 leaves the whole number in the low bits; |quotient| <= 2^14.
        Floats magic = splat(12582912.0f);
        remainder = (Ints)(bits_of(quotient + magic) - bits_of(magic));
    }
    Ints finite = (Ints)(weight & 0x7c00u) != 0x7c00;
    return {weight, (Words)(remainder & finite)};
}

template <class R>
INLINE void read_split(Block& w, const uint16_t* weight, const R* remainder, bool bf16, int count) {
    uint16_t staged_weight[BLOCK];
    R staged[BLOCK];
    if (__builtin_expect(count != BLOCK, 0)) {
        stage(staged_weight, weight, count);
        stage(staged, remainder, count);
        weight = staged_weight;
        remainder = staged;
    } else {
        for (int line = 0; line < 4; line++) prefetch((const char*)weight + AHEAD + line * 64);
        for (int line = 0; line < int(2 * sizeof(R)); line++) prefetch((const char*)remainder + AHEAD + line * 64);
    }
    each_vector([&](int i) {
        Words extra = sign_extend(load<typename Remainder<R>::Vector>(remainder + i * LANES));
        w.v[i] = join<R>(bf16, widen(load<Halves>(weight + i * LANES)), extra);
    });
}

template <class R>
INLINE void write_split(const Block& w, uint16_t* weight, R* remainder, bool bf16, int count, bool stochastic, uint32_t first,
                        Source source) {
    uint16_t staged_weight[BLOCK];
    R staged[BLOCK];
    bool whole = __builtin_expect(count == BLOCK, 1);
    uint16_t* to_weight = whole ? weight : staged_weight;
    R* to_remainder = whole ? remainder : staged;
    bool random_needed = stochastic && sizeof(R) == 1;
    each_vector([&](int i) {
        Words random = random_needed ? random_bits(first + i * LANES, source) : Words{};
        Split split = !bf16            ? split_fp16<R>(w.v[i], random_needed, random)
                      : sizeof(R) == 2 ? split_bf16_16(w.v[i])
                                       : split_bf16_8(w.v[i], random_needed, random);
        store(to_weight + i * LANES, low_halves(split.weight));
        store_remainder(to_remainder + i * LANES, split.remainder);
    });
    if (whole) return;
    for (int i = 0; i < count; i++) {
        weight[i] = to_weight[i];
        remainder[i] = to_remainder[i];
    }
}

INLINE void read_typed(Block& x, const void* from, int32_t dtype, int64_t b, int count) {
    if (dtype == FP32) return read_block<Fp32>(x, static_cast<const float*>(from) + b * BLOCK, count);
    const uint16_t* half = static_cast<const uint16_t*>(from) + b * BLOCK;
    if (dtype == BF16) return read_block<Bf16>(x, half, count);
    read_block<Fp16>(x, half, count);
}

INLINE void write_typed(void* to, int32_t dtype, const Block& x, int64_t b, int count) {
    if (dtype == FP32) return write_block<Fp32>(static_cast<float*>(to) + b * BLOCK, x, count);
    uint16_t* half = static_cast<uint16_t*>(to) + b * BLOCK;
    if (dtype == BF16) return write_block<Bf16>(half, x, count);
    write_block<Fp16>(half, x, count);
}

INLINE void read_master(Block& w, const AdamJob& job, int64_t b, int count) {
    const State& master = job.master;
    const uint16_t* weight = static_cast<const uint16_t*>(job.param) + b * BLOCK;
    bool bf16 = job.param_dtype == BF16;
    switch (master.format) {
        case MASTER_OWN: return read_typed(w, job.param, job.param_dtype, b, count);
        case MASTER_FP32: return read_typed(w, master.data, FP32, b, count);
        case MASTER_SPLIT32:
            return read_split(w, weight, static_cast<const int16_t*>(master.data) + b * BLOCK, bf16, count);
        case MASTER_SPLIT24:
            return read_split(w, weight, static_cast<const int8_t*>(master.data) + b * BLOCK, bf16, count);
        case MASTER_FP16:
            return decode_half_block(w, static_cast<const uint16_t*>(master.data) + b * BLOCK, master.scale_inv[b], count);
    }
}

// Stores master and parameter.
INLINE void write_master(const AdamJob& job, Block& w, int64_t b, int count) {
    const State& master = job.master;
    uint16_t* weight = static_cast<uint16_t*>(job.param) + b * BLOCK;
    uint32_t first = uint32_t(b * BLOCK);
    bool bf16 = job.param_dtype == BF16;
    switch (master.format) {
        case MASTER_OWN: return write_typed(job.param, job.param_dtype, w, b, count);
        case MASTER_FP32:
            write_typed(master.data, FP32, w, b, count);
            return write_typed(job.param, job.param_dtype, w, b, count);
        case MASTER_SPLIT32:
            return write_split(w, weight, static_cast<int16_t*>(master.data) + b * BLOCK, bf16, count, job.stochastic,
                               first, {master.key, MASTER_SHIFT});
        case MASTER_SPLIT24:
            return write_split(w, weight, static_cast<int8_t*>(master.data) + b * BLOCK, bf16, count, job.stochastic,
                               first, {master.key, MASTER_SHIFT});
        case MASTER_FP16:
            master.scale_inv[b] = encode_half_block<true>(static_cast<uint16_t*>(master.data) + b * BLOCK, w, count,
                                                    job.stochastic, first, {master.key, MASTER_SHIFT}, false);
            return write_typed(job.param, job.param_dtype, w, b, count);
    }
}

}  // namespace
