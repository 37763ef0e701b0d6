"""The fused step of Adam on a GPU: one pass over memory, nothing on the host, the twin of `kernels.adam.reference_step`.

A program takes ROWS blocks of 128 elements, reads gradient, states and master, computes in fp32 exactly as
`numerics.adam` spells it, and writes states, master and weights. What it moves is what is stored: 11 bytes per parameter
of a split24 O2 step with a bf16 gradient, so it runs at the speed of a copy.
"""

from __future__ import annotations

from ctypes import c_float

import torch
import triton
import triton.language as tl

from ...numerics import expansion
from ...numerics.random_bits import EXP_AVG_SHIFT, EXP_AVG_SQ_SHIFT, MASTER_SHIFT
from ...numerics.states import RATIO_FORMATS, ROOT_FORMATS
from ..adam import AdamStep
from . import cast, codec, ieee, masters, states
from .flat import signed
from .launch import LAUNCH, hardware_casts, on_device

SHIFT_M, SHIFT_V, SHIFT_W = (tl.constexpr(shift) for shift in (EXP_AVG_SHIFT, EXP_AVG_SQ_SHIFT, MASTER_SHIFT))

ROWS = 8
"""Blocks per program: 1024 elements, eight per thread with four warps."""


@triton.jit(do_not_specialize=["key"])
def _adam_kernel(param_ptr, grad_ptr, m_ptr, m_scale_ptr, m_expansion_ptr, v_ptr, v_scale_ptr, v_expansion_ptr,
                 master_ptr, master_scale_ptr, weight16_ptr, table_ptr, grad_scale_ptr, grad_scale, decay, l2, beta2,
                 lerp_weight, one_minus_beta2, correction, eps, step_size, n, key,
                 M_FORMAT: tl.constexpr, M_RATIO: tl.constexpr, V_FORMAT: tl.constexpr, V_ROOT: tl.constexpr,
                 MASTER: tl.constexpr, HALF: tl.constexpr, SCALE_TENSOR: tl.constexpr, DECAY: tl.constexpr,
                 L2: tl.constexpr, LERP_SMALL: tl.constexpr, WEIGHT16: tl.constexpr, STOCHASTIC: tl.constexpr,
                 ROWS: tl.constexpr, EVEN: tl.constexpr, ORDINARY: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * 128 + tl.arange(0, 128)[None, :]
    if EVEN:
        inside, row_inside = tl.full([ROWS, 128], 1, tl.int1), tl.full([ROWS], 1, tl.int1)
    else:
        inside, row_inside = index < n, row * 128 < n
    if SCALE_TENSOR:
        g = codec.load(grad_ptr + index, inside) * tl.load(grad_scale_ptr).to(tl.float32)
    else:
        g = codec.load(grad_ptr + index, inside) * grad_scale
    w = masters.read(param_ptr, master_ptr, master_scale_ptr, index, row, inside, row_inside, MASTER, HALF)
    m = states.read(m_ptr, m_scale_ptr, m_expansion_ptr, table_ptr, index, row, inside, row_inside, M_FORMAT, HARDWARE)
    v = states.read(v_ptr, v_scale_ptr, v_expansion_ptr, table_ptr, index, row, inside, row_inside, V_FORMAT, HARDWARE)
    if M_RATIO:
        m = m * states.divisor(v, V_ROOT)
    if V_ROOT:
        v = v * v

    one = tl.full(g.shape, 1.0, tl.float32)
    if DECAY:
        w = w * decay
    if L2:
        g = codec.fma(one * l2, w, g)
    if LERP_SMALL:
        m = codec.fma(one * lerp_weight, g - m, m)
    else:
        m = codec.fma(one * lerp_weight, g - m, g)
    v = v * beta2
    v = codec.fma(g * one_minus_beta2, g, v)
    # With v in fp32 the order is torch's, and `correction` divides; else the shorter one, and it multiplies.
    DIVIDES: tl.constexpr = V_FORMAT == states.FP32
    numerator = m * step_size if DIVIDES else m
    if ORDINARY:
        root, change = ieee.root_and_change(v, numerator, correction, eps, DIVIDES)
    else:
        root = tl.sqrt_rn(v)
        if DIVIDES:
            change = tl.div_rn(numerator, tl.div_rn(root, one * correction) + eps)
        else:
            change = tl.div_rn(numerator, codec.fma(one * correction, root, one * eps))
    if DIVIDES:
        w = w + change
    else:
        w = codec.fma(one * step_size, change, w)
    if not EVEN:
        # A tile may reach beyond the end: there nothing may count in a block's amax.
        w, m = tl.where(inside, w, 0.0), tl.where(inside, m, 0.0)
        v, root = tl.where(inside, v, 0.0), tl.where(inside, root, 0.0)

    word_m, word_v, word_w = index, index, index  # not used when rounding to nearest
    if STOCHASTIC:
        word = codec.random_words(index, key)
        word_m, word_v, word_w = word << SHIFT_M, word << SHIFT_V, word << SHIFT_W
    stored = root if V_ROOT else v
    kept = states.write(v_ptr, v_scale_ptr, v_expansion_ptr, table_ptr, stored, index, row, inside, row_inside, word_v,
                        V_FORMAT, V_ROOT, STOCHASTIC, HARDWARE)  # fmt: skip
    if M_RATIO:
        # Beyond the end m is zero and a root that nobody stored is positive or zero: their ratio is zero as well.
        divisor = states.divisor(kept, V_ROOT)
        if HARDWARE:
            m = ieee.ratio(m, divisor)
        else:
            m = tl.div_rn(m, divisor)
    states.write(m_ptr, m_scale_ptr, m_expansion_ptr, table_ptr, m, index, row, inside, row_inside, word_m, M_FORMAT, False,
                 STOCHASTIC, HARDWARE)  # fmt: skip
    held = masters.write(
        param_ptr,
        master_ptr,
        master_scale_ptr,
        w,
        index,
        row,
        inside,
        row_inside,
        word_w,
        MASTER,
        HALF,
        STOCHASTIC,
        HARDWARE,
    )
    if WEIGHT16:
        codec.store(weight16_ptr + index, held, inside)


def adam_step(step: AdamStep) -> None:
    """One step of one flat partition on the device; see `AdamStep` for every buffer. Waits for nothing."""
    n = step.param.numel()
    scalars, param = step.scalars, step.param
    source = step.source(EXP_AVG_SHIFT)
    key = 0 if source is None else signed(source.key)
    correction = scalars.bias_correction2_sqrt if step.exp_avg_sq.format == "fp32" else scalars.inverse_correction2_sqrt
    m, v, master = step.exp_avg, step.exp_avg_sq, step.master
    expanded = "e4m3_expanded" in (m.format, v.format)
    table = expansion.table(param.device) if expanded else param
    from_m = scalars.one_minus_beta1 < 0.5
    # One fp32 subtraction, made here: c_float rounds a double to fp32.
    lerp_weight = scalars.one_minus_beta1 if from_m else c_float(scalars.one_minus_beta1).value - 1.0
    by_tensor = isinstance(step.grad_scale, torch.Tensor)
    hardware = hardware_casts(param)
    ordinary = hardware and ieee.ordinary(scalars.eps, scalars.bias_correction2_sqrt)

    def pointer(tensor: torch.Tensor | None) -> torch.Tensor:
        return param if tensor is None else tensor  # never read: its branch is compiled away

    with on_device(param):
        _adam_kernel[(triton.cdiv(n, ROWS * 128),)](
            param, step.grad, m.data, pointer(m.scale_inv), pointer(m.expansion),
            v.data, pointer(v.scale_inv), pointer(v.expansion),
            pointer(master.data), pointer(master.scale_inv), pointer(step.weight16), table,
            step.grad_scale if by_tensor else param, 1.0 if by_tensor else float(step.grad_scale),
            scalars.decay, scalars.l2, scalars.beta2, lerp_weight, scalars.one_minus_beta2,
            correction, scalars.eps, scalars.step_size, n, key,
            states.FORMATS[m.format], m.format in RATIO_FORMATS, states.FORMATS[v.format], v.format in ROOT_FORMATS,
            masters.KINDS[master.format], param.dtype == torch.float16, by_tensor, scalars.decay != 1.0, scalars.l2 != 0.0,
            from_m, step.weight16 is not None, step.rounding == "stochastic", ROWS,
            n % (ROWS * 128) == 0, ordinary, hardware, **LAUNCH,
        )  # fmt: skip
    if step.weight_codes is not None:
        _write_weight_codes(step)


def _write_weight_codes(step: AdamStep) -> None:
    """FP8 codes and amaxes of the new 16-bit weight, one launch per segment."""
    wanted = step.weight_codes
    assert wanted is not None
    weight = step.param if step.weight16 is None else step.weight16
    wanted.amax.zero_()
    for number, (start, stop) in enumerate(wanted.segments):
        scale, amax = wanted.scale[number : number + 1], wanted.amax[number : number + 1]
        cast.quantize(weight[start:stop], scale, wanted.fmt, wanted.codes[start:stop], amax)
