"""Masters: what a 16-bit weight and its remainder give back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_fp8.numerics import masters
from ds_fp8.numerics.random_bits import Stochastic

BF16, FP16, INT16, INT8 = torch.bfloat16, torch.float16, torch.int16, torch.int8


def bits(x):
    return x.view(torch.int32)


def patterns(low, high, numel=20000, seed=0):
    """fp32 numbers with random bit patterns between two magnitudes, both signs."""
    generator = torch.Generator().manual_seed(seed)
    low, high = bits(torch.tensor(low)).item(), bits(torch.tensor(high)).item()
    magnitude = torch.randint(low, high, (numel,), generator=generator, dtype=torch.int32).view(torch.float32)
    return torch.where(torch.rand(numel, generator=generator) < 0.5, magnitude, -magnitude)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_bf16_split32_is_fp32(seed):
    """A bijection: every fp32 pattern but NaN's payloads comes back, subnormals and signed zeros too."""
    x = torch.cat([patterns(1e-45, 3e38, 2000, seed), torch.tensor([0.0, -0.0, math.inf, -math.inf])])
    assert torch.equal(bits(masters.join(*masters.split(x, BF16, INT16))), bits(x))


def test_bf16_weight_is_rne_but_for_ties():
    """Half up needs 65536 remainders, half to even 65537: ties, one master in 65536, go away from zero."""
    x = patterns(1e-3, 10.0, 1 << 18)
    weight, _ = masters.split(x, BF16, INT16)
    differ = weight != x.bfloat16()
    assert ((bits(x)[differ] & 0xFFFF) == 0x8000).all()
    tie = torch.tensor([0x3F808000, 0x3F818000], dtype=torch.int32).view(torch.float32)
    weight, remainder = masters.split(tie, BF16, INT16)
    assert weight.view(torch.int16).tolist() == [0x3F81, 0x3F82]
    assert remainder.tolist() == [-32768, -32768]


def test_bf16_split24_keeps_sixteen_bits_of_mantissa():
    """Relative error at most half of 2^-15, and a second split of what was joined changes nothing."""
    x = patterns(1e-30, 1e30)
    pair = masters.split(x, BF16, INT8)
    back = masters.join(*pair)
    assert ((back - x).abs() <= x.abs() * 2.0**-15 / 2).all()
    assert all(torch.equal(a, b) for a, b in zip(masters.split(back, BF16, INT8), pair, strict=True))


@pytest.mark.parametrize("base", [BF16, FP16])
@pytest.mark.parametrize("remainder", [INT16, INT8])
def test_not_finite_is_seen_in_the_weight(base, remainder):
    """A master that is not finite must not hide behind a healthy 16-bit weight."""
    nan_with_payload = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor([math.inf, -math.inf, math.nan]), nan_with_payload])
    weight, _ = masters.split(x, base, remainder)
    assert weight[:2].tolist() == [math.inf, -math.inf]
    assert weight[2:].isnan().all()


def test_fp16_split32_is_fp32_from_two_to_the_minus_16_up():
    """The remainder counts in ulp(weight) / 2^15; fp32 has 13 bits below fp16's, and below 6e-5 the ulp stands
    still.
    """
    x = torch.cat([patterns(2.0**-16, 60000.0), torch.tensor([0.0, 65504.0])])
    weight, remainder = masters.split(x, FP16, INT16)
    assert torch.equal(weight, x.half())
    assert torch.equal(masters.join(weight, remainder), x)
    tiny = patterns(1e-30, 2.0**-16)
    assert ((masters.join(*masters.split(tiny, FP16, INT16)) - tiny).abs() <= 2.0**-40).all()


def test_fp16_split24_adds_seven_bits():
    x = patterns(2.0**-14, 60000.0)
    back = masters.join(*masters.split(x, FP16, INT8))
    assert ((back - x).abs() <= x.abs() * 2.0**-10 / 2**7 / 2).all()


@pytest.mark.parametrize("base", [BF16, FP16])
def test_stochastic_split24_has_the_right_mean(base):
    """A movement of a tenth of a unit survives on average: five sigma of 20000 draws are 1.8 % of a unit."""
    unit = 2.0**-15 / 2 if base is BF16 else 2.0**-10 / 2**7
    x = torch.full((20000,), 1.5 + 0.1 * unit)
    back = masters.join(*masters.split(x, base, INT8, Stochastic(1, 1, 3)))
    assert abs((back.double() - 1.5).mean().item() / unit - 0.1) < 5 * 0.3 / math.sqrt(20000) + 2.0**-24 / unit
    assert torch.equal(masters.join(*masters.split(x, base, INT8)), torch.full_like(x, 1.5))


@pytest.mark.parametrize("base", [BF16, FP16, torch.float32])
@pytest.mark.parametrize("fmt", ["fp32", "split32", "split24", "fp16"])
def test_a_new_master_is_the_parameter(base, fmt):
    param = (torch.randn(300, generator=torch.Generator().manual_seed(0)) * 0.02).to(base)
    master = masters.new_master(fmt, param)
    assert master.format == ("own" if base is torch.float32 else fmt)
    tolerance = 2.0**-11 if fmt == "fp16" else 0.0
    assert torch.allclose(masters.read(master, param), param.float(), rtol=tolerance, atol=0)


def test_the_parameter_always_agrees_with_the_master():
    """What is written is one number in two parts: the 16-bit weight is the master, rounded."""
    values = torch.randn(300, generator=torch.Generator().manual_seed(1)) * 0.02
    for base in (BF16, FP16):
        for fmt in ("fp32", "split32", "split24", "fp16"):
            param = torch.zeros(300, dtype=base)
            master = masters.new_master(fmt, param)
            masters.write(master, param, values)
            stored = masters.read(master, param)
            half_ulp = 2.0**-8 if base is BF16 else 2.0**-11
            assert torch.allclose(param.float(), stored, rtol=half_ulp, atol=2.0**-25), (base, fmt)
            assert torch.allclose(stored, values, rtol=2.0**-11, atol=0)


@pytest.mark.parametrize(("fmt", "rounding"), [("split32", False), ("split24", False), ("fp16", True)])
def test_movement_survives_where_bf16_alone_would_stand_still(fmt, rounding):
    """200 steps, each 1e-4 of the weight, always up or always down: half an ulp of bf16 is 20 to 39 times that.

    99 % must arrive. Up or down by lot: if all grew alike, a block's scale would grow with them and hide the rounding.
    """
    param = (torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    start, master = param.float(), masters.new_master(fmt, param)
    change = 1e-4 * start * torch.randn(4096, generator=torch.Generator().manual_seed(1)).sign()
    for step in range(200):
        source = Stochastic(1, step, 3) if rounding else None
        masters.write(master, param, masters.read(master, param) + change, source)
    moved = (masters.read(master, param) - start) * change.sign()
    assert moved.sum() / (200 * change.abs()).sum() == pytest.approx(1.0, abs=0.01)

    alone = start.clone().bfloat16()
    for _ in range(200):
        alone = (alone.float() + change).bfloat16()
    assert torch.equal(alone, start.bfloat16())


def test_a_split_needs_sixteen_bits():
    with pytest.raises(ValueError, match="float32"):
        masters.split(torch.zeros(3), torch.float32, INT16)
    with pytest.raises(ValueError, match="split16"):
        masters.new_master("split16", torch.zeros(3, dtype=BF16))
