"""Laws of the block codecs on flat partitions: error bounds, short blocks, odd blocks, sums over ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_fp8.formats import BLOCK_SIZE, E4M3, E5M2
from ds_fp8.numerics import blocks16, expansion, flat
from ds_fp8.numerics.random_bits import Stochastic

SIZES = st.integers(0, 700)
FORMATS = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)


def heavy_tailed(numel, seed, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator) * torch.exp(spread * torch.randn(numel, generator=generator))


def amax_at_each(x):
    return flat.spread(flat.as_blocks(x).abs().amax(1), x.numel()) if x.numel() else x


@FORMATS
@settings(max_examples=25, deadline=None)
@given(numel=SIZES, seed=st.integers(0, 2**31), exponent=st.integers(-60, 60))
def test_error_is_half_an_ulp_or_half_the_smallest_code(fmt, numel, seed, exponent):
    """|x - back| <= max(|x| * half_ulp, amax * min_subnormal / (2 * max)), plus fp32's own rounding of the scales."""
    x = heavy_tailed(numel, seed) * 2.0**exponent
    quantized, scale_inv = flat.encode(x, fmt)
    assert quantized.dtype == torch.uint8
    assert scale_inv.shape == (-(-numel // BLOCK_SIZE),)
    bound = torch.maximum(x.abs() * fmt.half_ulp, amax_at_each(x) * (fmt.min_subnormal / fmt.max / 2))
    assert ((flat.decode(quantized, scale_inv, fmt) - x).abs() <= bound * (1 + 2.0**-18)).all()


@FORMATS
@settings(max_examples=15, deadline=None)
@given(numel=SIZES, seed=st.integers(0, 2**31))
def test_the_largest_of_a_block_is_code_max(fmt, numel, seed):
    """The range is used to its end and never left: amax decodes to itself within fp32 rounding."""
    x = heavy_tailed(numel, seed)
    quantized, scale_inv = flat.encode(x, fmt)
    back = flat.decode(quantized, scale_inv, fmt)
    assert torch.allclose(amax_at_each(back), amax_at_each(x), rtol=2.0**-22, atol=0)


@FORMATS
def test_chunks_give_the_quantized_values_of_the_whole(fmt):
    """A chunk that starts at a block's edge knows everything that its quantized values depend on, the random bits
    too.
    """
    x = heavy_tailed(1000, 3)
    for rounding in (None, Stochastic(1, 2, 3)):
        whole, _ = flat.encode(x, fmt, rounding=rounding)
        head, _ = flat.encode(x[:384], fmt, rounding=rounding)
        tail, _ = flat.encode(x[384:], fmt, rounding=rounding and rounding.at(384))
        assert torch.equal(whole, torch.cat([head, tail]))


@FORMATS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_decodes_to_nan_and_its_neighbours_do_not(fmt, bad):
    """e4m3 would turn inf into a healthy 448: an overflow on one rank must be seen by all."""
    x = torch.ones(300)
    x[130] = bad
    quantized, scale_inv = flat.encode(x, fmt)
    back = flat.decode(quantized, scale_inv, fmt)
    assert back[128:256].isnan().all()
    assert torch.equal(back[:128], x[:128])
    assert torch.equal(back[256:], x[256:])
    assert (quantized[128:256] == 0x7F).all()


@FORMATS
def test_zero_and_tiny_blocks(fmt):
    """Zero stays zero with its sign; below 2^-126 * max the scale stops so that its inverse stays finite."""
    x = torch.zeros(384)
    x[0], x[128], x[256] = -0.0, 1e-38, 1e-44
    quantized, scale_inv = flat.encode(x, fmt)
    assert scale_inv.isfinite().all()
    assert (1 / scale_inv).isfinite().all()
    back = flat.decode(quantized, scale_inv, fmt)
    assert quantized[0] == 0x80
    assert abs(back[128].item() - 1e-38) <= 1e-38 * fmt.half_ulp + 2.0**-126 * fmt.min_subnormal
    assert back[256].item() == 0.0


def test_decode_rounds_once_into_the_wanted_dtype():
    x = heavy_tailed(300, 5)
    quantized, scale_inv = flat.encode(x, E4M3)
    exact = flat.decode(quantized, scale_inv, E4M3)
    out = torch.empty(300, dtype=torch.bfloat16)
    assert flat.decode(quantized, scale_inv, E4M3, out=out) is out
    assert torch.equal(out, exact.bfloat16())
    assert torch.equal(flat.decode(quantized, scale_inv, E4M3, dtype=torch.float16), exact.half())


def test_sum_over_ranks_cannot_saturate():
    """64 equal contributions at the end of the range: their sum is 64 times one, in fp32, and so is its
    requantization.
    """
    quantized, scale_inv = flat.encode(torch.full((200,), 5.0), E4M3)
    total = flat.sum_contributions(quantized.expand(64, -1), scale_inv.expand(64, -1), E4M3, factor=1 / 64)
    assert torch.allclose(total, torch.full((200,), 5.0), rtol=64 * 2.0**-23)
    quantized, scale_inv = flat.sum_and_encode(quantized.expand(64, -1), scale_inv.expand(64, -1), E4M3, out_fmt=E5M2)
    assert torch.allclose(flat.decode(quantized, scale_inv, E5M2), torch.full((200,), 320.0), rtol=64 * 2.0**-23)


@settings(max_examples=25, deadline=None)
@given(numel=SIZES, seed=st.integers(0, 2**31), exponent=st.integers(-60, 60))
def test_fp16_blocks_keep_eleven_bits_over_29_powers_of_two(numel, seed, exponent):
    """amax goes to 2^15 and fp16's normals end at 2^-14: no underflow where unscaled fp16 would have lost
    everything.
    """
    x = heavy_tailed(numel, seed, spread=1.0) * 2.0**exponent
    back = blocks16.decode(*blocks16.encode(x))
    normal = x.abs() >= amax_at_each(x) * 2.0**-29
    assert ((back - x).abs() <= x.abs() * 2.0**-11 * (1 + 2.0**-10))[normal].all()


@settings(max_examples=25, deadline=None)
@given(numel=SIZES, seed=st.integers(0, 2**31), exponent=st.integers(-60, 60))
def test_expansion_keeps_every_nonzero_of_a_narrow_block(numel, seed, exponent):
    """k stretches the block to e4m3's whole range: error at most half a step of z = u^k, divided by k on the way back.

    In the subnormals of z, the lowest three of 17.8 powers of two, a step is wider: at most half of the value itself.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.exp(torch.rand(numel, generator=generator) * 6 - 3) * 2.0**exponent
    quantized, scale_inv, k = expansion.encode(x)
    back = expansion.decode(quantized, scale_inv, k)
    assert (k >= 16).all()
    assert (quantized & 0x7F > 0).all()
    assert ((back / x - 1).abs() <= 0.51).all()
    assert torch.allclose(amax_at_each(back), amax_at_each(x), rtol=2.0**-21, atol=0)


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
def test_the_best_of_two_is_never_worse_and_keeps_its_amax(fmt):
    """Two places for amax, the format's maximum and the power of two below it: each block takes the better one.

    On normal numbers the error falls from .0257 to .0243 in e4m3, on lognormal ones (s = 2) by a fifth: a few large
    elements decide, and one scale of two hits them.
    """
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(128 * 512, generator=generator)
    wide = normal * (2 * torch.randn(128 * 512, generator=generator)).exp()
    for x, gain in ((normal, 0.96), (wide, 0.85)):
        errors = []
        for best_of_two in (False, True):
            back = flat.decode(*flat.encode(x, fmt, best_of_two=best_of_two), fmt)
            assert torch.allclose(amax_at_each(back), amax_at_each(x), rtol=2.0**-22, atol=0)
            errors.append(flat.as_blocks(back - x).square().sum(1))
        assert (errors[1] <= errors[0] * (1 + 2.0**-18)).all()
        assert (errors[1].sum() / errors[0].sum()).sqrt() < gain


def test_expansion_halves_the_error_of_e4m3():
    """Normal numbers, 128 to a block: they span 8 of the 17.8 powers of two, so k is about 2 and the error about
    half.
    """
    x = torch.randn(128 * 64, generator=torch.Generator().manual_seed(0))
    baseline = (flat.decode(*flat.encode(x, E4M3), E4M3) - x).norm() / x.norm()
    expanded = (expansion.decode(*expansion.encode(x)) - x).norm() / x.norm()
    assert expanded < 0.6 * baseline


def test_expansion_of_one_magnitude_zeros_and_not_finite():
    for value in (3.0, -1e-20, 0.0):
        x = torch.full((200,), value)
        assert torch.allclose(expansion.decode(*expansion.encode(x)), x, rtol=2.0**-22, atol=0)
    x = torch.ones(200)
    x[3] = math.inf
    back = expansion.decode(*expansion.encode(x))
    assert back[:128].isnan().all()
    assert torch.allclose(back[128:], x[128:])


def test_expansion_functions_are_accurate():
    """log2 within 7e-7 and the rounding of its sum (half an ulp of 126: 3.8e-6), exp2 within 5e-7 relative.

    The worst expansion multiplies by 16: still far below half a step of e4m3, 2^-4.
    """
    u = torch.logspace(-37, 0, 20001, dtype=torch.float64).float()
    assert (expansion.log2(u).double() - u.double().log2()).abs().max() < 7e-7 + 3.9e-6
    assert expansion.log2(torch.ones(1)).item() == 0.0
    y = torch.linspace(-126, 0, 20001)
    exact = torch.exp2(y.double())
    assert ((expansion.exp2(y).double() - exact) / exact).abs().max() < 5e-7
    assert expansion.exp2(torch.zeros(1)).item() == 1.0


def test_expansion_table_row_16_is_e4m3():
    """k = 1 is no expansion: the table holds the code values themselves, within the polynomials' error."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.allclose(expansion.table()[16, :127], values, rtol=2e-6)
    assert expansion.table()[:, 126].eq(448.0).all()
