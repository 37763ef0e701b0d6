// One pass of Adam or AdamW over a flat partition: read quantized values, compute in fp32 (update.h), write quantized
// values.
//
// Any combination of formats goes block by block (`step_block`); the one that levels O2 and O3 choose has a faster way
// through the same arithmetic (groups.h). Compiled once for each path, with -DADAM_RANGE=adam_avx512 and so on.
#include "path.h"

#include "groups.h"

namespace {

INLINE bool is_root(const State& state) { return state.format >= STATE_FP16; }
INLINE bool is_ratio(const State& state) { return state.format >= STATE_E4M3; }

// What exp_avg is divided by where it is a ratio, from what exp_avg_sq reads.
INLINE void read_divisor(Block& d, const Block& stored, bool roots) {
    each_vector([&](int i) { d.v[i] = divisor(roots ? stored.v[i] : root(stored.v[i])); });
}

// One block of any formats; the last one may be short.
__attribute__((noinline)) void step_block(const AdamJob& job, int64_t b) {
    bool roots = is_root(job.exp_avg_sq), ratios = is_ratio(job.exp_avg);
    int count = elements_in_block(b, job.numel);
    Update update(job);
    Block g, w, m, v, r;
    read_typed(g, job.grad, job.grad_dtype, b, count);
    scale_block(g, *job.grad_scale);
    read_master(w, job, b, count);
    read_state(m, job.exp_avg, job.expansion_table, b, count);
    read_state(v, job.exp_avg_sq, job.expansion_table, b, count);
    if (ratios) {
        read_divisor(r, v, roots);
        each_vector([&](int i) { m.v[i] = m.v[i] * r.v[i]; });
    }
    if (roots) each_vector([&](int i) { v.v[i] = v.v[i] * v.v[i]; });
    if (job.torch_sqrt) {  // torch's root comes by the block
        float squares[BLOCK], roots_of[BLOCK];
        each_vector([&](int i) {
            v.v[i] = update.square(w.v[i], g.v[i], m.v[i], v.v[i]);
            store(squares + i * LANES, v.v[i]);
        });
        job.torch_sqrt(BLOCK, squares, roots_of, job.torch_sqrt_mode);
        each_vector([&](int i) { w.v[i] = update.move(w.v[i], m.v[i], r.v[i] = load<Floats>(roots_of + i * LANES)); });
    } else {
        each_vector([&](int i) {
            v.v[i] = update.square(w.v[i], g.v[i], m.v[i], v.v[i]);
            r.v[i] = root(v.v[i]);
            w.v[i] = update.move(w.v[i], m.v[i], r.v[i]);
        });
    }
    write_state(job.exp_avg_sq, roots ? r : v, b, count, job.stochastic, roots, EXP_AVG_SQ_SHIFT);
    write_master(job, w, b, count);
    if (ratios) {
        // Read back, it is by itself what the next step will see, whatever has rounded it. The master stands between
        // write and read so that the stores have arrived.
        read_state(v, job.exp_avg_sq, job.expansion_table, b, count);
        read_divisor(r, v, roots);
        each_vector([&](int i) { m.v[i] = m.v[i] / r.v[i]; });
    }
    write_state(job.exp_avg, m, b, count, job.stochastic, false, EXP_AVG_SHIFT);
}

void adam_range(const void* data, int64_t first, int64_t last) {
    const AdamJob& job = *static_cast<const AdamJob*>(data);
    bool grouped = fits_groups(job);
    int64_t whole_blocks = job.numel / BLOCK;
    int64_t b = first;
    Group group;
    if (grouped)
        for (; b + GROUP <= last && b + GROUP <= whole_blocks; b += GROUP) step_group(job, group, b);
    for (; b < last; b++) step_block(job, b);
}

}  // namespace

extern const RangeFunction ADAM_RANGE = adam_range;
