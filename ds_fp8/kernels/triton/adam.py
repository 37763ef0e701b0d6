"""The fused step of Adam on a GPU: one pass over memory, nothing on the host, the counterpart of
`kernels.adam.reference_step`.

A program takes ROWS blocks of 128 elements, reads gradient, states and master, computes in fp32 exactly as
`numerics.adam` spells it, and writes states, master and weights. What it moves is what is stored: 14 bytes per
parameter of a split24 O2 step with a bf16 gradient. The states of O2 and O3 take the fast path of `adam_fast.py`, tile
by tile, where it gives the same bits.
"""

from __future__ import annotations

from ctypes import c_float

import torch
import triton
import triton.language as tl

from ...levels import MASTERS
from ...numerics import expansion
from ...numerics.random_bits import EXP_AVG_SHIFT
from ...numerics.states import RATIO_FORMATS, ROOT_FORMATS
from ..adam import AdamStep
from . import adam_fast, codec, ieee, masters, states
from .flat import signed
from .launch import LAUNCH, hardware_casts, on_device

ROWS, WARPS = 8, 4
"""Blocks and warps of a program, where the general step does all tiles: 1024 elements, eight per thread."""

FAST_ROWS, FAST_WARPS = 4, 2
"""The same where tiles take the fast path."""


@triton.jit
def _gradient(grad_ptr, grad_scale_ptr, grad_scale, index, inside, SCALE_TENSOR: tl.constexpr):
    """The gradient in fp32, unscaled and clipped."""
    g = codec.load(grad_ptr + index, inside)
    if SCALE_TENSOR:
        g = g * tl.load(grad_scale_ptr).to(tl.float32)
    else:
        g = g * grad_scale
    return g


@triton.jit
def _general(param_ptr, m_ptr, m_scale_ptr, m_expansion_ptr, v_ptr, v_scale_ptr, v_expansion_ptr, master_ptr,
             master_scale_ptr, table_ptr, g, index, row, inside, row_inside, decay, l2, beta2, lerp_weight,
             one_minus_beta2, correction, eps, step_size, key, M_FORMAT: tl.constexpr, M_RATIO: tl.constexpr,
             V_FORMAT: tl.constexpr, V_ROOT: tl.constexpr, MASTER: tl.constexpr, HALF: tl.constexpr,
             DECAY: tl.constexpr, L2: tl.constexpr, LERP_SMALL: tl.constexpr, STOCHASTIC: tl.constexpr,
             EVEN: tl.constexpr, FAST: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    """One tile, whatever is in it."""
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
    if FAST:
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
        word_m, word_v, word_w = word << states.SHIFT_M, word << states.SHIFT_V, word << states.SHIFT_W
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
    states.write(m_ptr, m_scale_ptr, m_expansion_ptr, table_ptr, m, index, row, inside, row_inside, word_m, M_FORMAT,
                 False, STOCHASTIC, HARDWARE)  # fmt: skip
    masters.write(param_ptr, master_ptr, master_scale_ptr, w, index, row, inside, row_inside, word_w, MASTER, HALF,
                  STOCHASTIC, HARDWARE)  # fmt: skip


@triton.jit(do_not_specialize=["key"])
def _adam_kernel(param_ptr, grad_ptr, m_ptr, m_scale_ptr, m_expansion_ptr, v_ptr, v_scale_ptr,
                 v_expansion_ptr, master_ptr, master_scale_ptr, table_ptr, grad_scale_ptr, grad_scale, decay,
                 l2, beta2, lerp_weight, one_minus_beta2, correction, eps, step_size, n, key,
                 M_FORMAT: tl.constexpr, M_RATIO: tl.constexpr, V_FORMAT: tl.constexpr, V_ROOT: tl.constexpr,
                 MASTER: tl.constexpr, HALF: tl.constexpr, SCALE_TENSOR: tl.constexpr,
                 DECAY: tl.constexpr, L2: tl.constexpr, LERP_SMALL: tl.constexpr,
                 STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
                 SHORT: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    index = row[:, None] * 128 + tl.arange(0, 128)[None, :]
    done = False
    if SHORT:  # noqa: SIM102 - a constant: without it the rest is not compiled
        # A tile that ends within the partition needs no mask. Small offsets from the tile's start are cheaper than
        # 64-bit ones.
        if (first + ROWS) * 128 <= n:
            begin = first * 128
            here, tile_row = tl.arange(0, ROWS)[:, None] * 128 + tl.arange(0, 128)[None, :], tl.arange(0, ROWS)
            whole, all_rows = tl.full([ROWS, 128], 1, tl.int1), tl.full([ROWS], 1, tl.int1)
            param, master, master_scale = param_ptr + begin, master_ptr + begin, master_scale_ptr + first
            m_data, m_scale, v_data, v_scale = m_ptr + begin, m_scale_ptr + first, v_ptr + begin, v_scale_ptr + first
            g = _gradient(grad_ptr + begin, grad_scale_ptr, grad_scale, here, whole, SCALE_TENSOR)
            w = masters.read(param, master, master_scale, here, tile_row, whole, all_rows, MASTER, HALF)
            m = states.read(m_data, m_scale, m_scale, table_ptr, here, tile_row, whole, all_rows, M_FORMAT, HARDWARE)
            v = states.read(v_data, v_scale, v_scale, table_ptr, here, tile_row, whole, all_rows, V_FORMAT, HARDWARE)
            done = adam_fast.step(param, m_data, m_scale, v_data, v_scale, master, master_scale, g, w, m, v,
                                 here, tile_row, begin, decay, l2, beta2, lerp_weight, one_minus_beta2, correction, eps,
                                 step_size, key, M_FORMAT, V_FORMAT, MASTER, DECAY, L2, LERP_SMALL, STOCHASTIC,
                                 HARDWARE)  # fmt: skip
    if not done:
        if EVEN:
            inside, row_inside = tl.full([ROWS, 128], 1, tl.int1), tl.full([ROWS], 1, tl.int1)
        else:
            inside, row_inside = index < n, row * 128 < n
        g = _gradient(grad_ptr, grad_scale_ptr, grad_scale, index, inside, SCALE_TENSOR)
        _general(param_ptr, m_ptr, m_scale_ptr, m_expansion_ptr, v_ptr, v_scale_ptr, v_expansion_ptr, master_ptr,
                 master_scale_ptr, table_ptr, g, index, row, inside, row_inside, decay, l2, beta2, lerp_weight,
                 one_minus_beta2, correction, eps, step_size, key, M_FORMAT, M_RATIO, V_FORMAT, V_ROOT, MASTER, HALF,
                 DECAY, L2, LERP_SMALL, STOCHASTIC, EVEN, FAST, HARDWARE)  # fmt: skip


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
    quick = hardware and ieee.has_normal_exponents(scalars.eps, scalars.bias_correction2_sqrt)

    def pointer(tensor: torch.Tensor | None) -> torch.Tensor:
        return param if tensor is None else tensor  # never read: its branch is compiled away

    short = _has_fast_path(step)
    rows, warps = (FAST_ROWS, FAST_WARPS) if short else (ROWS, WARPS)
    with on_device(param):
        _adam_kernel[(triton.cdiv(n, rows * 128),)](
            param, step.grad, m.data, pointer(m.scale_inv), pointer(m.expansion),
            v.data, pointer(v.scale_inv), pointer(v.expansion),
            pointer(master.data), pointer(master.scale_inv), table,
            step.grad_scale if by_tensor else param, 1.0 if by_tensor else float(step.grad_scale),
            scalars.decay, scalars.l2, scalars.beta2, lerp_weight, scalars.one_minus_beta2,
            correction, scalars.eps, scalars.step_size, n, key,
            states.FORMATS[m.format], m.format in RATIO_FORMATS, states.FORMATS[v.format], v.format in ROOT_FORMATS,
            masters.KINDS[master.format], param.dtype == torch.float16, by_tensor,
            scalars.decay != 1.0, scalars.l2 != 0.0, from_m, step.rounding == "stochastic", rows,
            n % (rows * 128) == 0 and not short, quick and not short, short, hardware, num_warps=warps, **LAUNCH,
        )  # fmt: skip


def _has_fast_path(step: AdamStep) -> bool:
    """Whether the step's formats and numbers are those of `adam_fast.py`."""
    if step.exp_avg.format not in adam_fast.MOMENTS or step.exp_avg_sq.format not in adam_fast.ROOTS:
        return False
    if step.master.format not in adam_fast.MASTERS:
        return False
    if MASTERS[step.master.format].contains_weight and step.param.dtype != torch.bfloat16:
        return False
    return ieee.has_normal_exponents(step.eps, step.scalars.bias_correction2_sqrt)
