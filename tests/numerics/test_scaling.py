"""Scales from amax: golden values of Transformer Engine, and the odd cases."""

from __future__ import annotations

import math

import torch

from ds_fp8.formats import E4M3, E5M2, FP32
from ds_fp8.numerics import dequantize_1x128, dequantize_128x128, quantize_1x128, quantize_128x128, scale_from_amax


def test_scale_fills_the_range():
    """448 / 2 = 224 brings an amax of 2 to the end of e4m3; 57344 / 2 to the end of e5m2."""
    assert scale_from_amax(2.0, E4M3).item() == 224.0
    assert scale_from_amax(2.0, E5M2).item() == 28672.0


def test_margin_halves_the_scale_per_step():
    """Margin 1 keeps one power of two of headroom: 112; margin -1 gives one away: 448."""
    assert scale_from_amax(2.0, E4M3, margin=1).item() == 112.0
    assert scale_from_amax(2.0, E4M3, margin=-1).item() == 448.0


def test_zero_and_not_finite_keep_the_previous_scale():
    amaxes = torch.tensor([0.0, math.inf, math.nan, 7.0])
    assert scale_from_amax(amaxes, E4M3, previous=torch.tensor([3.0, 4.0, 5.0, 6.0])).tolist() == [3.0, 4.0, 5.0, 64.0]


def test_a_tiny_amax_gives_the_largest_finite_scale():
    """448 / 1e-38 overflows fp32; an infinite scale would turn zeros into NaN, as MS-AMP's does below 1.3e-36."""
    assert scale_from_amax(torch.tensor([1e-38, 1e-45]), E4M3).tolist() == [FP32.max, FP32.max]


def test_golden_history_of_delayed_scaling():
    """Transformer Engine, fp8_max 448, history 4, amaxes 1, 8, 2, 4, 1, 1: the scale after each step."""
    amaxes, history = [1.0, 8.0, 2.0, 4.0, 1.0, 1.0], []
    by_max, most_recent = [], []
    for amax in amaxes:
        history = [*history, amax][-4:]
        by_max.append(scale_from_amax(max(history), E4M3).item())
        most_recent.append(scale_from_amax(history[-1], E4M3).item())
    assert by_max == [448, 56, 56, 56, 56, 112]
    assert most_recent == [448, 56, 224, 112, 448, 448]


def test_1x128_groups_have_their_own_scales():
    """A giant in one group does not touch its neighbour; the last group is short."""
    x = torch.ones(3, 300)
    x[1, 5] = 1e6
    quantized, scale_inv = quantize_1x128(x, E4M3)
    assert scale_inv.shape == (3, 3)
    back = dequantize_1x128(quantized, scale_inv)
    assert torch.equal(back[0], x[0])
    assert torch.equal(back[1, 128:], x[1, 128:])
    assert abs(back[1, 5].item() / 1e6 - 1) <= E4M3.half_ulp


def test_128x128_tiles_have_their_own_scales():
    x = torch.ones(200, 300)
    x[150, 290] = 448.0 * 2**20
    quantized, scale_inv = quantize_128x128(x, E4M3)
    assert scale_inv.shape == (2, 3)
    back = dequantize_128x128(quantized, scale_inv)
    assert torch.equal(back[:128], x[:128])
    assert back[150, 290].item() == x[150, 290].item()


def test_block_scales_are_powers_of_two_unless_asked_otherwise():
    """amax 3: 448 / 3 = 149.3 becomes 128, or stays; both never saturate."""
    x = torch.full((1, 128), 3.0)
    assert quantize_1x128(x, E4M3)[1].item() == 1 / 128
    exact = quantize_1x128(x, E4M3, power_of_two=False)[1].item()
    assert abs(exact / (3 / 448) - 1) <= 2 * 2.0**-24


def test_block_scales_of_zero_and_not_finite_groups_are_one():
    """Transformer Engine's rule; NaN stays NaN, infinity saturates."""
    x = torch.zeros(3, 128)
    x[1, 0], x[2, 0] = math.inf, math.nan
    quantized, scale_inv = quantize_1x128(x, E4M3)
    assert scale_inv.flatten().tolist() == [1.0, 1.0, 1.0]
    assert quantized.float()[1, 0] == 448.0
    assert quantized.float()[2, 0].isnan()
