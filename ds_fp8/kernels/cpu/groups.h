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
//
// Where the time goes, in cycles for 16 elements of O2 (AVX-512 on an EPYC of the Zen 4 kind, 3.7 GHz, data in the second
// cache level): moments 13.4, weights 9.7, roots 9.4, ratios 3.1, together 35 or .595 ns a parameter; random words 6.6
// besides. The divider is busy for 22 of them (a root 10, two quotients 6 each) but not alone in the way: with the root
// taken out the moments need 11.6, with its quotient the roots' phase 10.0 of 11.2. Nearly every instruction on 512 bits
// takes a cycle there, so their number counts; to fuse moments and weights, or to interleave by stages, made it slower.
// torch's fused fp32 step needs .58 ns (28 bytes at 48 GB/s): half of that would be 17 cycles, fewer than the divider's 22.
#pragma once

#include "packs.h"
#include "states.h"
#include "update.h"

namespace {

constexpr int GROUP = 8;
constexpr int GROUP_NUMEL = GROUP * BLOCK;

enum MasterKind { SPLIT24, SPLIT24_STOCHASTIC, SPLIT32, SCALED16 };

struct alignas(64) Group {
    Floats smallest[GROUP];  // root, by lane
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
    static INLINE Floats decode(const uint8_t* quantized) { return decode_int8((const int8_t*)quantized); }
    template <bool stochastic>
    static INLINE Words encode(Floats x, const uint32_t* words) {
        return stochastic ? encode_int8_stochastic(x, load<Words>(words)) : encode_int8(x);
    }
};

struct RatioE4m3 {
    static constexpr float UNIT = E4m3::UNIT, TOP = E4m3::MAX;
    static INLINE Floats decode(const uint8_t* quantized) { return E4m3::decode<true>(load<Bytes>(quantized)); }
    template <bool stochastic>
    static INLINE Words encode(Floats x, const uint32_t* words) {
        return stochastic ? encode_stochastic<E4m3>(x, load<Words>(words)) : encode_nearest_within<E4m3>(x);
    }
};

// A block without zeros among its roots, the usual case, spares a look at each divisor, and one whose roots are normal
// fp16 numbers an easier rounding. One question per block decides; a path that cannot ask quickly says no.

// Above this scale_inv no code but zero decodes to zero.
constexpr float SAFE_SCALE_INV = 0x1p-100f;

INLINE bool has_zero_code(const uint16_t* quantized) {
#if defined(__AVX512F__)
    __m512i low = _mm512_loadu_si512(quantized);
#pragma GCC unroll 3
    for (int i = 32; i < BLOCK; i += 32) low = _mm512_min_epu16(low, _mm512_loadu_si512(quantized + i));
    return _mm512_testn_epi16_mask(low, low);
#elif defined(__AVX2__)
    __m256i low = _mm256_loadu_si256((const __m256i*)quantized);
#pragma GCC unroll 7
    for (int i = 16; i < BLOCK; i += 16) low = _mm256_min_epu16(low, _mm256_loadu_si256((const __m256i*)(quantized + i)));
    return _mm256_movemask_epi8(_mm256_cmpeq_epi16(low, _mm256_setzero_si256()));
#else
    return true;
#endif
}

// Whether every lane is at least `bound`; NaN is not.
INLINE bool all_reach(Floats x, float bound) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, (__m512)splat(bound), _CMP_GE_OQ) == 0xffff;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)splat(bound), _CMP_GE_OQ)) == 0xff;
#else
    return false;
#endif
}

template <bool zeros>
INLINE Floats divisor_if(Floats r) {
    return zeros ? divisor(r) : r;
}

// The largest of each block's vector of amaxes; eight reductions at once where shuffles are dear.
INLINE void reduce_amaxes(uint32_t* amax, const Words* tops) {
#if defined(__AVX512F__)
    const __m512i* t = (const __m512i*)tops;
    __m512i halves[4], quarters[2];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
        halves[k] = _mm512_max_epu32(_mm512_shuffle_i64x2(t[2 * k], t[2 * k + 1], 0x44),
                                     _mm512_shuffle_i64x2(t[2 * k], t[2 * k + 1], 0xee));
#pragma GCC unroll 2
    for (int k = 0; k < 2; k++)  // 128 bits for each of four blocks
        quarters[k] = _mm512_max_epu32(_mm512_shuffle_i64x2(halves[2 * k], halves[2 * k + 1], 0x88),
                                       _mm512_shuffle_i64x2(halves[2 * k], halves[2 * k + 1], 0xdd));
    __m512i pairs = _mm512_max_epu32(_mm512_unpacklo_epi64(quarters[0], quarters[1]),
                                     _mm512_unpackhi_epi64(quarters[0], quarters[1]));
    pairs = _mm512_max_epu32(pairs, _mm512_shuffle_epi32(pairs, (_MM_PERM_ENUM)0xb1));
    __m512i places = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 10, 6, 2, 12, 8, 4, 0);
    _mm256_storeu_si256((__m256i*)amax, _mm512_castsi512_si256(_mm512_permutexvar_epi32(places, pairs)));
#else
    for (int k = 0; k < GROUP; k++) amax[k] = largest(tops[k]);
#endif
}

// What one block's moments are made of.
template <class D>
struct MomentsOfBlock {
    const typename D::Type* grad;
    const uint8_t* ratios;
    const uint16_t* roots;
    Floats grad_scale, ratio_unit, root_unit;
};

// Leaves m and r in the group; returns the largest r by lane, and the smallest.
template <class R, bool zeros, class D>
INLINE Words update_block_moments(const Update& update, Group& group, int block, const MomentsOfBlock<D>& from, Floats& smallest) {
    Words top = {}, low = ~Words{};
#pragma GCC unroll 2
    for (int i = block; i < block + BLOCK; i += PACK * LANES) {
        Floats g[PACK];
        read_pack(g, from.grad + i);
#pragma GCC unroll 4
        for (int p = 0; p < PACK; p++) {
            int at = i + p * LANES;
            Floats r = half_to_float(load<Halves>(from.roots + at)) * from.root_unit;
            Floats m = R::decode(from.ratios + at) * from.ratio_unit * divisor_if<zeros>(r);
            r = update.moments(g[p] * from.grad_scale, m, r * r);
            top = larger(top, bits_of(r));  // never -0; a NaN of either sign stays on top
            low = smaller(low, bits_of(r));
            store(group.root + at, r);
            store(group.mean + at, m);
        }
    }
    smallest = floats_of(low);
    return top;
}

template <class D, class R>
__attribute__((noinline)) void update_moments(const AdamJob& job, Group& group, int64_t first_block) {
    Update update(job);
    Floats grad_scale = splat(*job.grad_scale);
    int64_t start = first_block * BLOCK;
    const typename D::Type* grad = static_cast<const typename D::Type*>(job.grad) + start;
    const uint8_t* ratios = static_cast<const uint8_t*>(job.exp_avg.data) + start;
    const uint16_t* roots = static_cast<const uint16_t*>(job.exp_avg_sq.data) + start;
    Words tops[GROUP];
    for (int k = 0; k < GROUP; k++) {
        int block = k * BLOCK;
        prefetch_ahead(grad + block, BLOCK * sizeof(typename D::Type));
        prefetch_ahead(ratios + block, BLOCK);
        prefetch_ahead(roots + block, BLOCK * 2);
        Floats ratio_unit = splat(job.exp_avg.scale_inv[first_block + k] * R::UNIT);
        float root_scale_inv = job.exp_avg_sq.scale_inv[first_block + k];
        bool zeros = has_zero_code(roots + block) || root_scale_inv < SAFE_SCALE_INV;
        MomentsOfBlock<D> from = {grad, ratios, roots, grad_scale, ratio_unit, splat(root_scale_inv)};
        tops[k] = zeros ? update_block_moments<R, true>(update, group, block, from, group.smallest[k])
                        : update_block_moments<R, false>(update, group, block, from, group.smallest[k]);
    }
    reduce_amaxes(group.amax, tops);
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
        if (kind == SPLIT24 || kind == SPLIT24_STOCHASTIC) {
#pragma GCC unroll 2
            for (int i = block; i < block + BLOCK; i += PACK * LANES) {
                Floats w[PACK];
                read_split24_pack(w, weights + i, remainders8 + i);
#pragma GCC unroll 4
                for (int p = 0; p < PACK; p++) {
                    int at = i + p * LANES;
                    w[p] = update.weight(w[p] * update.decay, load<Floats>(group.mean + at), load<Floats>(group.root + at));
                }
                write_split24_pack<kind == SPLIT24_STOCHASTIC>(w, weights + i, remainders8 + i, group.words + i);
            }
            continue;
        }
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

// fp16 values of one vector, as encode_half_block makes them.
template <bool stochastic, int shift>
INLINE Halves quantized_half(Floats scaled, const uint32_t* words) {
    if (!stochastic) return float_to_half(scaled);
    Words bits = bits_of(scaled);
    Words code = encode_magnitude_stochastic<10, 15>(bits & MAGNITUDE, load<Words>(words) << shift);
    return narrow_to_halves(code | ((bits & SIGN) >> 16));
}

template <class T>
INLINE void fill_block(T* quantized, T code) {
    for (int i = 0; i < BLOCK; i++) quantized[i] = code;
}

// Quantized values of one block of roots; `normal`: all are normal numbers of fp16.
template <bool stochastic, bool normal>
INLINE Words encode_block_roots(Group& group, uint16_t* quantized, int block, Floats scale, Floats scale_inv) {
    Words top = {};
#pragma GCC unroll 2
    for (int i = block; i < block + BLOCK; i += LANES) {
        Floats r = load<Floats>(group.root + i);
        Halves code;
        if (normal) {
            code = stochastic ? normal_half_stochastic(r * scale, load<Words>(group.words + i) << EXP_AVG_SQ_SHIFT)
                              : float_to_half(r * scale);
        } else {
            code = smallest_if_positive(quantized_half<stochastic, EXP_AVG_SQ_SHIFT>(r * scale, group.words + i), r);
        }
        store(quantized + i, code);
        Floats ratio = load<Floats>(group.mean + i) / divisor_if<!normal>(half_to_float(code) * scale_inv);
        store(group.mean + i, ratio);
        top = larger(top, bits_of(ratio) & MAGNITUDE);
    }
    return top;
}

template <bool stochastic>
__attribute__((noinline)) void encode_roots(const AdamJob& job, Group& group, int64_t first_block) {
    uint16_t* quantized = static_cast<uint16_t*>(job.exp_avg_sq.data) + first_block * BLOCK;
    make_scales(group, job.exp_avg_sq.scale_inv + first_block, BLOCKS16_TOP);
    Words tops[GROUP];
    for (int k = 0; k < GROUP; k++) {
        int block = k * BLOCK;
        Floats scale = splat(group.scale[k]), scale_inv = splat(group.scale_inv[k]);
        tops[k] = all_reach(group.smallest[k] * scale, SMALLEST_NORMAL_HALF)
                      ? encode_block_roots<stochastic, true>(group, quantized, block, scale, scale_inv)
                      : encode_block_roots<stochastic, false>(group, quantized, block, scale, scale_inv);
        // A block that is not finite has a NaN scale_inv: all ratios have become NaN, whatever the code.
        if (__builtin_expect(group.amax[k] >= INFINITE, 0)) fill_block(quantized + block, NAN_HALF);
    }
    reduce_amaxes(group.amax, tops);
}

template <class R, bool stochastic>
__attribute__((noinline)) void encode_ratios(const AdamJob& job, Group& group, int64_t first_block) {
    uint8_t* quantized = static_cast<uint8_t*>(job.exp_avg.data) + first_block * BLOCK;
    make_scales(group, job.exp_avg.scale_inv + first_block, R::TOP);
    for (int k = 0; k < GROUP; k++) {
        int block = k * BLOCK;
        Floats scale = splat(group.scale[k]);
#pragma GCC unroll 4
        for (int i = block; i < block + BLOCK; i += LANES) {
            Floats x = load<Floats>(group.mean + i) * scale;
            store(quantized + i, low_bytes(R::template encode<stochastic>(x, group.words + i)));
        }
        if (__builtin_expect(group.amax[k] >= INFINITE, 0)) fill_block(quantized + block, NAN_CODE);
    }
}

template <bool stochastic>
__attribute__((noinline)) void encode_scaled_masters(const AdamJob& job, Group& group, int64_t first_block) {
    uint16_t* quantized = static_cast<uint16_t*>(job.master.data) + first_block * BLOCK;
    uint16_t* weights = static_cast<uint16_t*>(job.param) + first_block * BLOCK;
    make_scales(group, job.master.scale_inv + first_block, BLOCKS16_TOP);
    for (int k = 0; k < GROUP; k++) {
        int block = k * BLOCK;
        Floats scale = splat(group.scale[k]), scale_inv = splat(group.scale_inv[k]);
#pragma GCC unroll 2
        for (int i = block; i < block + BLOCK; i += LANES) {
            Halves code = quantized_half<stochastic, MASTER_SHIFT>(load<Floats>(group.weight + i) * scale, group.words + i);
            store(quantized + i, code);
            Bf16::write(weights + i, half_to_float(code) * scale_inv);
        }
        if (__builtin_expect(group.amax[k] >= INFINITE, 0)) fill_block(quantized + block, NAN_HALF);
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
           job.param_dtype == BF16 && (job.grad_dtype == BF16 || job.grad_dtype == FP32) &&
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
