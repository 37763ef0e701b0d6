// The step for the states of levels O2 and O3: exp_avg in int8 or e4m3, exp_avg_sq as fp16 roots, in groups of 8 blocks.
//
// A block cannot be encoded before its amax is known, and its ratios m / r not before r is encoded. Done block by block
// these two chains (reduce, divide, divide, spread) leave the processor waiting, and five blocks of 128 floats do not fit
// into the registers. So a group of 8 blocks goes through phases; what passes between them stays in the first cache level:
//
//     update   read all, compute, store weight and master (unless its scale waits for an amax); keep m, r and their amaxes
//     roots    encode r; m becomes the ratio to the r that was stored; its amaxes
//     ratios   encode m / r
//
// Scales are made between the phases, for 8 blocks at a time, so their divisions overlap. Every value is that of the
// general path in adam.cpp, to the bit. Only whole groups come here.
#pragma once

#include "masters.h"
#include "states.h"
#include "update.h"

namespace {

constexpr int GROUP = 8;
constexpr int GROUP_NUMEL = GROUP * BLOCK;

enum MasterKind { SPLIT24, SPLIT24_STOCHASTIC, SPLIT32, SCALED16 };

struct alignas(64) Group {
    float root[GROUP_NUMEL], mean[GROUP_NUMEL], weight[GROUP_NUMEL];
    uint32_t words[GROUP_NUMEL];  // random bits, one word per element
    uint32_t amax[GROUP], amax_weight[GROUP];
    float scale_inv[GROUP], scale[GROUP];
};

// Brings the lines of the group after this one into the cache, one block's share at a time: a phase reads what the same
// phase of the group before has asked for.
INLINE void prefetch_ahead(const void* from, int64_t bytes_per_block) {
    const char* ahead = static_cast<const char*>(from) + GROUP * bytes_per_block;
    for (int64_t line = 0; line < bytes_per_block; line += 64) prefetch(ahead + line);
}

// Scales that bring each block's amax to `top`.
INLINE void make_scales(Group& group, float* stored, float top) {
    for (int k = 0; k < GROUP; k++) {
        group.scale_inv[k] = stored[k] = block_scale_inv(group.amax[k], top);
        group.scale[k] = 1.0f / group.scale_inv[k];
    }
}

__attribute__((noinline)) void draw_words(Group& group, int64_t first_block, uint32_t key) {
    uint32_t first = uint32_t(first_block * BLOCK);
    for (int i = 0; i < GROUP_NUMEL; i += LANES) store(group.words + i, random_bits(first + i, {key, 0}));
}

// The two formats of exp_avg that come here: value = decode * scale_inv * UNIT.
struct Ratio8 {
    static constexpr float UNIT = 1.0f, TOP = BLOCKS8_TOP;
    static INLINE Floats decode(const uint8_t* codes) { return decode_int8((const int8_t*)codes); }
    template <bool stochastic>
    static INLINE Words encode(Floats x, const uint32_t* words) {
        return stochastic ? encode_int8_stochastic(x, load<Words>(words)) : encode_int8(x);
    }
};

struct RatioE4m3 {
    static constexpr float UNIT = E4m3::UNIT, TOP = E4m3::MAX;
    static INLINE Floats decode(const uint8_t* codes) { return E4m3::decode<true>(load<Bytes>(codes)); }
    template <bool stochastic>
    static INLINE Words encode(Floats x, const uint32_t* words) {
        return stochastic ? encode_stochastic<E4m3>(x, load<Words>(words)) : encode_nearest_within<E4m3>(x);
    }
};

template <class D, class R>
__attribute__((noinline)) void update_moments(const AdamJob& job, Group& group, int64_t first_block) {
    Update update(job);
    Floats grad_scale = splat(*job.grad_scale);
    int64_t start = first_block * BLOCK;
    const typename D::Type* grad = static_cast<const typename D::Type*>(job.grad) + start;
    const uint8_t* ratios = static_cast<const uint8_t*>(job.exp_avg.data) + start;
    const uint16_t* roots = static_cast<const uint16_t*>(job.exp_avg_sq.data) + start;
    for (int k = 0; k < GROUP; k++) {
        int block = k * BLOCK;
        prefetch_ahead(grad + block, BLOCK * sizeof(typename D::Type));
        prefetch_ahead(ratios + block, BLOCK);
        prefetch_ahead(roots + block, BLOCK * 2);
        Floats ratio_unit = splat(job.exp_avg.scale_inv[first_block + k] * R::UNIT);
        Floats root_unit = splat(job.exp_avg_sq.scale_inv[first_block + k]);
        Words top = {};
#pragma GCC unroll 2
        for (int i = block; i < block + BLOCK; i += LANES) {
            Floats r = half_to_float(load<Halves>(roots + i)) * root_unit;
            Floats m = R::decode(ratios + i) * ratio_unit * divisor(r);
            r = update.moments(D::read(grad + i) * grad_scale, m, r * r);
            top = larger(top, bits_of(r));  // never -0; a NaN of either sign stays on top
            store(group.root + i, r);
            store(group.mean + i, m);
        }
        group.amax[k] = largest(top);
    }
}

template <MasterKind kind>
__attribute__((noinline)) void update_weights(const AdamJob& job, Group& group, int64_t first_block) {
    Update update(job);
    int64_t start = first_block * BLOCK;
    uint16_t* weights = static_cast<uint16_t*>(job.param) + start;
    int8_t* remainders8 = static_cast<int8_t*>(job.master.data) + start;
    int16_t* remainders16 = static_cast<int16_t*>(job.master.data) + start;
    uint16_t* scaled = static_cast<uint16_t*>(job.master.data) + start;
    for (int k = 0; k < GROUP; k++) {
        int block = k * BLOCK;
        prefetch_ahead(weights + block, BLOCK * 2);
        if (kind == SPLIT24 || kind == SPLIT24_STOCHASTIC) prefetch_ahead(remainders8 + block, BLOCK);
        if (kind == SPLIT32) prefetch_ahead(remainders16 + block, BLOCK * 2);
        if (kind == SCALED16) prefetch_ahead(scaled + block, BLOCK * 2);
        Floats scaled_unit = splat(kind == SCALED16 ? job.master.scale_inv[first_block + k] : 0.0f);
        Words top = {};
#pragma GCC unroll 2
        for (int i = block; i < block + BLOCK; i += LANES) {
            Words high = widen(load<Halves>(weights + i));
            Floats w;
            if (kind == SPLIT32) w = join<int16_t>(true, high, sign_extend(load<Shorts>(remainders16 + i)));
            else if (kind == SCALED16) w = half_to_float(load<Halves>(scaled + i)) * scaled_unit;
            else w = join<int8_t>(true, high, sign_extend(load<Chars>(remainders8 + i)));
            w = update.weight(w * update.decay, load<Floats>(group.mean + i), load<Floats>(group.root + i));
            if (kind == SCALED16) {
                top = larger(top, bits_of(w) & MAGNITUDE);
                store(group.weight + i, w);
                continue;
            }
            Words random = kind == SPLIT24_STOCHASTIC ? load<Words>(group.words + i) << MASTER_SHIFT : Words{};
            Split split = kind == SPLIT32 ? split_bf16_16(w) : split_bf16_8(w, kind == SPLIT24_STOCHASTIC, random);
            store(weights + i, low_halves(split.weight));
            if (kind == SPLIT32) store_remainder(remainders16 + i, split.remainder);
            else store_remainder(remainders8 + i, split.remainder);
        }
        if (kind == SCALED16) group.amax_weight[k] = largest(top);
    }
}

// fp16 codes of one vector, as encode_half_block makes them.
template <bool stochastic, int shift>
INLINE Halves half_codes(Floats scaled, const uint32_t* words) {
    if (!stochastic) return float_to_half(scaled);
    Words bits = bits_of(scaled);
    Words code = encode_magnitude_stochastic<10, 15>(bits & MAGNITUDE, load<Words>(words) << shift);
    return narrow_to_halves(code | ((bits & SIGN) >> 16));
}

template <class T>
INLINE void fill_block(T* codes, T code) {
    for (int i = 0; i < BLOCK; i++) codes[i] = code;
}

template <bool stochastic>
__attribute__((noinline)) void encode_roots(const AdamJob& job, Group& group, int64_t first_block) {
    uint16_t* codes = static_cast<uint16_t*>(job.exp_avg_sq.data) + first_block * BLOCK;
    make_scales(group, job.exp_avg_sq.scale_inv + first_block, BLOCKS16_TOP);
    for (int k = 0; k < GROUP; k++) {
        int block = k * BLOCK;
        Floats scale = splat(group.scale[k]), scale_inv = splat(group.scale_inv[k]);
        Words top = {};
#pragma GCC unroll 2
        for (int i = block; i < block + BLOCK; i += LANES) {
            Floats r = load<Floats>(group.root + i);
            Halves code = smallest_if_positive(half_codes<stochastic, EXP_AVG_SQ_SHIFT>(r * scale, group.words + i), r);
            store(codes + i, code);
            Floats ratio = load<Floats>(group.mean + i) / divisor(half_to_float(code) * scale_inv);
            store(group.mean + i, ratio);
            top = larger(top, bits_of(ratio) & MAGNITUDE);
        }
        // A block that is not finite has a NaN scale_inv: all ratios have become NaN, whatever the code.
        if (__builtin_expect(group.amax[k] >= INFINITE, 0)) fill_block(codes + block, NAN_HALF);
        group.amax[k] = largest(top);
    }
}

template <class R, bool stochastic>
__attribute__((noinline)) void encode_ratios(const AdamJob& job, Group& group, int64_t first_block) {
    uint8_t* codes = static_cast<uint8_t*>(job.exp_avg.data) + first_block * BLOCK;
    make_scales(group, job.exp_avg.scale_inv + first_block, R::TOP);
    for (int k = 0; k < GROUP; k++) {
        int block = k * BLOCK;
        Floats scale = splat(group.scale[k]);
#pragma GCC unroll 4
        for (int i = block; i < block + BLOCK; i += LANES) {
            Floats x = load<Floats>(group.mean + i) * scale;
            store(codes + i, low_bytes(R::template encode<stochastic>(x, group.words + i)));
        }
        if (__builtin_expect(group.amax[k] >= INFINITE, 0)) fill_block(codes + block, NAN_CODE);
    }
}

template <bool stochastic>
__attribute__((noinline)) void encode_scaled_masters(const AdamJob& job, Group& group, int64_t first_block) {
    uint16_t* codes = static_cast<uint16_t*>(job.master.data) + first_block * BLOCK;
    uint16_t* weights = static_cast<uint16_t*>(job.param) + first_block * BLOCK;
    make_scales(group, job.master.scale_inv + first_block, BLOCKS16_TOP);
    for (int k = 0; k < GROUP; k++) {
        int block = k * BLOCK;
        Floats scale = splat(group.scale[k]), scale_inv = splat(group.scale_inv[k]);
#pragma GCC unroll 2
        for (int i = block; i < block + BLOCK; i += LANES) {
            Halves code = half_codes<stochastic, MASTER_SHIFT>(load<Floats>(group.weight + i) * scale, group.words + i);
            store(codes + i, code);
            Bf16::write(weights + i, half_to_float(code) * scale_inv);
        }
        if (__builtin_expect(group.amax[k] >= INFINITE, 0)) fill_block(codes + block, NAN_HALF);
    }
}

template <class R>
INLINE void update_group(const AdamJob& job, Group& group, int64_t first_block) {
    if (job.grad_dtype == BF16) update_moments<Bf16, R>(job, group, first_block);
    else update_moments<Fp32, R>(job, group, first_block);
    if (job.master.format == MASTER_FP16) return update_weights<SCALED16>(job, group, first_block);
    if (job.master.format == MASTER_SPLIT32) return update_weights<SPLIT32>(job, group, first_block);
    if (!job.stochastic) return update_weights<SPLIT24>(job, group, first_block);
    update_weights<SPLIT24_STOCHASTIC>(job, group, first_block);
}

template <class R, bool stochastic>
INLINE void encode_group(const AdamJob& job, Group& group, int64_t first_block) {
    encode_roots<stochastic>(job, group, first_block);
    encode_ratios<R, stochastic>(job, group, first_block);
    if (job.master.format != MASTER_FP16) return;
    for (int k = 0; k < GROUP; k++) group.amax[k] = group.amax_weight[k];
    encode_scaled_masters<stochastic>(job, group, first_block);
}

INLINE bool fits_groups(const AdamJob& job) {
    int32_t master = job.master.format;
    bool has_master = master == MASTER_SPLIT24 || master == MASTER_SPLIT32 || master == MASTER_FP16;
    bool has_ratio = job.exp_avg.format == STATE_INT8 || job.exp_avg.format == STATE_E4M3;
    return has_ratio && job.exp_avg_sq.format == STATE_FP16 && has_master &&
           job.param_dtype == BF16 && (job.grad_dtype == BF16 || job.grad_dtype == FP32) && !job.weight16 &&
           job.l2 == 0.0f && job.one_minus_beta1 < 0.5f;
}

template <class R>
INLINE void step_group_of(const AdamJob& job, Group& group, int64_t first_block) {
    if (job.stochastic) draw_words(group, first_block, job.master.key);
    update_group<R>(job, group, first_block);
    job.stochastic ? encode_group<R, true>(job, group, first_block) : encode_group<R, false>(job, group, first_block);
}

INLINE void step_group(const AdamJob& job, Group& group, int64_t first_block) {
    if (job.exp_avg.format == STATE_INT8) step_group_of<Ratio8>(job, group, first_block);
    else step_group_of<RatioE4m3>(job, group, first_block);
}

}  // namespace
