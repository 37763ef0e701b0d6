// One pass of Adam or AdamW over a flat partition: read codes, compute in fp32, write codes, 128 elements at a time.
//
// The order of operations and the places of the two fma's are the reference's (ds_fp8/numerics/adam.py), which are
// torch's; so with fp32 states and master the result is torch.optim.AdamW's to the bit. The pass is bound by memory:
// what it costs is the bytes of the formats. Compiled once for each path, with -DADAM_RANGE=adam_avx512 and so on.
#include "path.h"

#include "codec.h"
#include "masters.h"
#include "states.h"

namespace {

constexpr int64_t PIECE = 32;  // blocks between two visits of the FP8 weights: 8 KiB of 16-bit weights, still in cache

INLINE void read_gradient(Block& g, const AdamJob& job, int64_t b, int count) {
    if (job.grad_dtype == GRADIENT_CODES) {
        decode_block<E4m3>(g, static_cast<const uint8_t*>(job.grad) + b * BLOCK, job.grad_scale_inv[b], count);
    } else {
        read_typed(g, job.grad, job.grad_dtype, b, count);
    }
    scale_block(g, *job.grad_scale);
}

// Updates w, m, v; leaves sqrt(v) in r. `from_torch`: the root is torch's, which comes by the block.
template <bool from_torch>
INLINE void update(const AdamJob& job, Block& w, const Block& gradient, Block& m, Block& v, Block& r) {
    Floats decay = splat(job.decay), l2 = splat(job.l2), beta2 = splat(job.beta2);
    Floats one_minus_beta1 = splat(job.one_minus_beta1), one_minus_beta2 = splat(job.one_minus_beta2);
    Floats correction = splat(job.bias_correction2_sqrt), eps = splat(job.eps), step_size = splat(job.step_size);
    bool has_l2 = job.l2 != 0.0f, from_m = job.one_minus_beta1 < 0.5f;
    auto moments = [&](int i) {
        Floats weight = w.v[i] * decay, g = gradient.v[i];
        if (has_l2) g = fma(l2, weight, g);
        Floats difference = g - m.v[i];
        m.v[i] = from_m ? fma(one_minus_beta1, difference, m.v[i]) : fma(one_minus_beta1 - splat(1.0f), difference, g);
        v.v[i] = fma(one_minus_beta2 * g, g, v.v[i] * beta2);
        w.v[i] = weight;
    };
    auto move = [&](int i) {
        Floats denominator = r.v[i] / correction + eps;
        w.v[i] = w.v[i] + (step_size * m.v[i]) / denominator;
    };
    if (from_torch) {
        float squares[BLOCK], roots[BLOCK];
        each_vector([&](int i) {
            moments(i);
            store(squares + i * LANES, v.v[i]);
        });
        job.torch_sqrt(BLOCK, squares, roots, job.torch_sqrt_mode);
        each_vector([&](int i) {
            r.v[i] = load<Floats>(roots + i * LANES);
            move(i);
        });
    } else {
        each_vector([&](int i) {
            moments(i);
            r.v[i] = root(v.v[i]);
            move(i);
        });
    }
}

template <class D, class F>
void encode_segment(const SegmentCodes& segments, int64_t number, const void* weight, int64_t start, int64_t stop) {
    QuantizeJob job = {};
    job.x = static_cast<const typename D::Type*>(weight) + start;
    job.codes = segments.codes + start;
    job.scale = segments.scale + number;
    job.amax = segments.amax + number;
    job.numel = stop - start;
    quantize_range<D, F>(job, 0, (stop - start + BLOCK - 1) / BLOCK);
}

// FP8 codes of the elements [start, stop) of the new weights, as far as segments ask for them. `number` is the first
// segment that may reach here, and is moved on.
void encode_segments(const AdamJob& job, int64_t start, int64_t stop, int64_t& number) {
    const SegmentCodes& segments = job.segments;
    const void* weight = job.weight16 ? job.weight16 : job.param;
    int32_t dtype = job.weight16 ? job.weight16_dtype : job.param_dtype;
    while (number < segments.count && segments.bounds[2 * number + 1] <= start) number++;
    for (int64_t s = number; s < segments.count && segments.bounds[2 * s] < stop; s++) {
        int64_t low = segments.bounds[2 * s], high = segments.bounds[2 * s + 1];
        low = low > start ? low : start;
        high = high < stop ? high : stop;
        if (low >= high) continue;
        bool e4m3 = segments.fmt == E4M3;
        if (dtype == FP32) e4m3 ? encode_segment<Fp32, E4m3>(segments, s, weight, low, high)
                                : encode_segment<Fp32, E5m2>(segments, s, weight, low, high);
        else if (dtype == BF16) e4m3 ? encode_segment<Bf16, E4m3>(segments, s, weight, low, high)
                                     : encode_segment<Bf16, E5m2>(segments, s, weight, low, high);
        else e4m3 ? encode_segment<Fp16, E4m3>(segments, s, weight, low, high)
                  : encode_segment<Fp16, E5m2>(segments, s, weight, low, high);
    }
}

INLINE bool is_root(const State& state) { return state.format >= STATE_FP16; }
INLINE bool is_ratio(const State& state) { return state.format >= STATE_E4M3; }

// What exp_avg is divided by where it is a ratio, from what exp_avg_sq reads: its root, or 1 where that is zero.
INLINE void divisor(Block& d, const Block& stored, bool roots) {
    if (!roots) each_vector([&](int i) { d.v[i] = root(stored.v[i]); });
    const Block& r = roots ? stored : d;
    each_vector([&](int i) { d.v[i] = r.v[i] == splat(0.0f) ? splat(1.0f) : r.v[i]; });
}

void adam_range(const void* data, int64_t first, int64_t last) {
    const AdamJob& job = *static_cast<const AdamJob*>(data);
    bool roots = is_root(job.exp_avg_sq), ratios = is_ratio(job.exp_avg);
    int64_t segment = 0;
    for (int64_t piece = first; piece < last; piece += PIECE) {
        int64_t end = piece + PIECE < last ? piece + PIECE : last;
        for (int64_t b = piece; b < end; b++) {
            int count = elements_in_block(b, job.numel);
            Block g, w, m, v, r;
            read_gradient(g, job, b, count);
            read_master(w, job, b, count);
            read_state(m, job.exp_avg, job.expansion_table, b, count);
            read_state(v, job.exp_avg_sq, job.expansion_table, b, count);
            if (ratios) {
                divisor(r, v, roots);
                each_vector([&](int i) { m.v[i] = m.v[i] * r.v[i]; });
            }
            if (roots) each_vector([&](int i) { v.v[i] = v.v[i] * v.v[i]; });
            job.torch_sqrt ? update<true>(job, w, g, m, v, r) : update<false>(job, w, g, m, v, r);
            write_state(job.exp_avg_sq, roots ? r : v, b, count, job.stochastic, roots);
            job.weight16 ? write_master<true>(job, w, b, count) : write_master<false>(job, w, b, count);
            if (job.weight16) write_typed(job.weight16, job.weight16_dtype, w, b, count);
            if (ratios) {
                // Read back, it is by itself what the next step will see, whatever has rounded it. The master stands
                // between write and read so that the stores have arrived.
                read_state(v, job.exp_avg_sq, job.expansion_table, b, count);
                divisor(r, v, roots);
                each_vector([&](int i) { m.v[i] = m.v[i] / r.v[i]; });
            }
            write_state(job.exp_avg, m, b, count, job.stochastic, false);
        }
        if (job.segments.count) {
            int64_t stop = end * BLOCK < job.numel ? end * BLOCK : job.numel;
            encode_segments(job, piece * BLOCK, stop, segment);
        }
    }
}

}  // namespace

extern const RangeFunction ADAM_RANGE = adam_range;
