// The update of Adam on one vector. The order of operations and the places of the two fma's are the reference's
// (ds_fp8/numerics/adam.py), which are torch's; so with fp32 states and master the result is torch.optim.AdamW's to the
// bit.
#pragma once

#include "blocks.h"

namespace {

struct Update {
    Floats decay, l2, beta2, lerp, one_minus_beta2, correction, inverse_correction, eps, step_size;
    bool has_l2, from_m, divides;

    explicit INLINE Update(const AdamJob& job)
        : decay(splat(job.decay)), l2(splat(job.l2)), beta2(splat(job.beta2)), one_minus_beta2(splat(job.one_minus_beta2)),
          correction(splat(job.bias_correction2_sqrt)), inverse_correction(splat(job.inverse_correction2_sqrt)),
          eps(splat(job.eps)), step_size(splat(job.step_size)), has_l2(job.l2 != 0.0f),
          from_m(job.one_minus_beta1 < 0.5f), divides(job.divides) {
        lerp = splat(from_m ? job.one_minus_beta1 : job.one_minus_beta1 - 1.0f);
    }

    // The usual case, in two halves: decoupled decay (applied by the caller), beta1 above one half, v not in fp32.
    INLINE Floats moments(Floats g, Floats& m, Floats v) const {
        m = fma(lerp, g - m, m);
        return root(fma(one_minus_beta2 * g, g, v * beta2));
    }

    INLINE Floats weight(Floats w, Floats m, Floats r) const {
        return fma(step_size, m / fma(inverse_correction, r, eps), w);
    }

    // Every case, in two halves, with a root between them: w decays, m becomes the new one; returns the new v.
    INLINE Floats square(Floats& w, Floats g, Floats& m, Floats v) const {
        w = w * decay;
        if (has_l2) g = fma(l2, w, g);
        m = fma(lerp, g - m, from_m ? m : g);
        return fma(one_minus_beta2 * g, g, v * beta2);
    }

    INLINE Floats move(Floats w, Floats m, Floats r) const {
        return divides ? w + (step_size * m) / (r / correction + eps) : weight(w, m, r);
    }
};

}  // namespace
