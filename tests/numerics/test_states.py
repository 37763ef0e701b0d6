"""States: every format on every kind of block, and the one hazard, a zero root beside a moment."""

from __future__ import annotations

import math

import pytest
import torch

from ds_fp8.levels import EXP_AVG_FORMATS, STATE_BYTES, STATE_FORMATS
from ds_fp8.numerics import blocks8, states
from ds_fp8.numerics.random_bits import Stochastic

TOLERANCE = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11 * 1.001, "e4m3": 2.0**-4 * 1.001, "e4m3_expanded": 0.12}
"""Half an ulp. Expanded: the smallest of a block is e4m3's smallest code, half a step of it is 1/2, and k = 4
divides that.
"""

TOLERANCE["int8"] = 0.5 / 127 * math.exp(3) * 1.001
"""Half a step, 1/254 of the block's amax, relative to the smallest of `narrow`, exp(3) below it."""


def narrow(numel=300, seed=0):
    """Magnitudes within a factor of 20: all normal in every format."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(torch.rand(numel, generator=generator) * 3 - 10)


@pytest.mark.parametrize("fmt", EXP_AVG_FORMATS)
def test_what_is_written_is_read(fmt):
    values = narrow()
    state = states.new_state(fmt, 300, "cpu")
    assert states.read(state).eq(0).all()
    states.write(state, values)
    assert torch.allclose(states.read(state), values, rtol=TOLERANCE[fmt], atol=0)
    states.write(state, values, Stochastic(1, 1, 1))
    assert torch.allclose(states.read(state), values, rtol=2.1 * TOLERANCE[fmt], atol=0)


@pytest.mark.parametrize("fmt", EXP_AVG_FORMATS)
@pytest.mark.parametrize("numel", [0, 1, 127, 128, 129, 1000])
def test_bytes_are_those_of_the_table(fmt, numel):
    state = states.new_state(fmt, numel, "cpu")
    blocks = -(-numel // 128)
    found = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors().values())
    data_bytes = int(STATE_BYTES[fmt])
    assert found == numel * data_bytes + blocks * round((STATE_BYTES[fmt] - data_bytes) * 128)


@pytest.mark.parametrize("fmt", sorted(states.ROOT_FORMATS))
@pytest.mark.parametrize("rounding", [None, Stochastic(1, 2, 2)])
def test_a_nonzero_root_is_never_code_zero(fmt, rounding):
    """Divided by eps alone, a moment beside it would blow up; a zero root stays zero."""
    root = torch.full((256,), 1e-30)
    root[0], root[1] = 1.0, 0.0
    state = states.new_state(fmt, 256, "cpu")
    states.write_root(state, root, rounding)
    back = states.read(state)
    assert back[1] == 0.0
    assert (back[2:128] > 0).all()
    assert torch.allclose(back[128:], root[128:], rtol=2.0**-4)


def test_roots_below_fp16_survive_in_their_own_block():
    """sqrt(v) of 1e-12: unscaled fp16 ends at 6e-8; the block's scale brings it to the middle of the range."""
    root = torch.full((128,), 1e-12)
    state = states.new_state("fp16", 128, "cpu")
    states.write_root(state, root)
    assert torch.allclose(states.read(state), root, rtol=2.0**-11)


@pytest.mark.parametrize("squares", STATE_FORMATS)
@pytest.mark.parametrize("fmt", EXP_AVG_FORMATS)
def test_moments_are_m_and_v_whatever_is_stored(fmt, squares):
    """The tolerance of m is that of its own format, however coarse sqrt(v) is: the divisor cancels.

    Ratios span a factor of exp(4.5) here, so k is 17.8 / 6.5 = 2.7, and half a step at the smallest code 1 - 1.5^(-1 /
    2.7); in int8 half a step is exp(4.5) / 254 of the smallest.
    """
    wide = {"e4m3_expanded": 0.14, "int8": 0.5 / 127 * math.exp(4.5)}
    tolerance = wide.get(fmt, TOLERANCE[fmt] + 2.0**-22)
    m, v = narrow(seed=1) * torch.tensor([1.0, -1.0]).repeat(150), narrow(seed=2)
    exp_avg, exp_avg_sq = states.new_state(fmt, 300, "cpu"), states.new_state(squares, 300, "cpu")
    states.write_exp_avg_sq(exp_avg_sq, v, v.sqrt())
    states.write_exp_avg(exp_avg, exp_avg_sq, m)
    assert torch.allclose(states.read_exp_avg(exp_avg, exp_avg_sq), m, rtol=tolerance)
    assert torch.allclose(states.read_exp_avg_sq(exp_avg_sq), v, rtol=2.1 * TOLERANCE[squares])


@pytest.mark.parametrize("squares", STATE_FORMATS)
@pytest.mark.parametrize("fmt", sorted(states.RATIO_FORMATS))
def test_a_ratio_does_not_care_for_the_size_of_its_neighbours(fmt, squares):
    """m over thirty powers of ten in one block, of which e4m3 without expansion spans five: relative to sqrt(v) they
    are all of one size. exp_avg_sq in e4m3 ends where its own block does, and there m is bounded by the smallest code's
    share.
    """
    root = torch.logspace(-15, 15, 128) if squares in ("fp32", "bf16") else torch.logspace(-2, 0, 128)
    m = root * torch.linspace(0.2, 1.0, 128)
    exp_avg, exp_avg_sq = states.new_state(fmt, 128, "cpu"), states.new_state(squares, 128, "cpu")
    states.write_exp_avg_sq(exp_avg_sq, root * root, root)
    states.write_exp_avg(exp_avg, exp_avg_sq, m)
    assert torch.allclose(states.read_exp_avg(exp_avg, exp_avg_sq), m, rtol=0.08)


@pytest.mark.parametrize("squares", STATE_FORMATS)
@pytest.mark.parametrize("fmt", sorted(states.RATIO_FORMATS))
def test_beside_a_zero_v_the_moment_itself_is_kept(fmt, squares):
    """A new state, or a v below fp32: m is not divided by zero, and not lost."""
    exp_avg, exp_avg_sq = states.new_state(fmt, 300, "cpu"), states.new_state(squares, 300, "cpu")
    states.write_exp_avg(exp_avg, exp_avg_sq, narrow())
    assert torch.allclose(states.read_exp_avg(exp_avg, exp_avg_sq), narrow(), rtol=TOLERANCE[fmt])


@pytest.mark.parametrize("squares", STATE_FORMATS)
@pytest.mark.parametrize("fmt", sorted(states.RATIO_FORMATS))
def test_nan_and_infinity_stay_visible_in_a_ratio(fmt, squares):
    """Of m: its block is NaN. Of v: where it reads as NaN or infinity, exp_avg is not finite either."""
    for m_bad, v_bad in ((float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf"))):
        m, v = torch.ones(256), torch.ones(256)
        m[3], v[3] = m_bad, v_bad
        exp_avg, exp_avg_sq = states.new_state(fmt, 256, "cpu"), states.new_state(squares, 256, "cpu")
        states.write_exp_avg_sq(exp_avg_sq, v, v.sqrt())
        states.write_exp_avg(exp_avg, exp_avg_sq, m)
        back = states.read_exp_avg(exp_avg, exp_avg_sq)
        assert not back[3].isfinite()
        assert torch.allclose(back[128:], m[128:], rtol=0.07)


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="int4"):
        states.new_state("int4", 3, "cpu")


def test_int8_divides_a_block_into_127_steps_to_each_side():
    """amax is code 127 exactly; between two FP8 values the nearer one, at a tie the even one; a short block has its own
    scale.
    """
    x = torch.arange(-127.0, 128.0, 0.5)[:128] * 0.25
    quantized, scale_inv = blocks8.encode(torch.cat([x, torch.tensor([3.0, -1.0])]))
    assert scale_inv.tolist() == [0.25, torch.tensor(3.0).div(127).item()]
    assert torch.equal(quantized[:128].float(), (x / 0.25).round())
    assert quantized[:3].tolist() == [-127, -126, -126]
    assert quantized[128:].tolist() == [127, -42]


def test_int8_rounds_stochastically_without_bias_and_never_beyond_127():
    """A whole number stays; a value between takes the upper neighbour with the probability of its fraction (4,000
    draws:
    four standard deviations are .032); largest and smallest values are +-127 whatever is drawn."""
    x = torch.linspace(-1, 1, 128).repeat(4000) * torch.tensor(127.0)
    x[1::128], x[2::128] = 5.0, 4.3
    quantized, scale_inv = blocks8.encode(x, rounding=Stochastic(3, 1, 1))
    assert scale_inv.eq(1.0).all()
    found = quantized.float().view(-1, 128)
    assert found[:, 0].eq(-127).all() and found[:, 127].eq(127).all() and found[:, 1].eq(5.0).all()
    assert set(found[:, 2].tolist()) == {4.0, 5.0}
    assert torch.allclose(found.mean(0), x[:128], atol=0.032)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rounding", [None, Stochastic(1, 2, 2)])
def test_an_int8_block_that_is_not_finite_is_nan_all_over(bad, rounding):
    x = torch.ones(256)
    x[7] = bad
    quantized, scale_inv = blocks8.encode(x, rounding=rounding)
    assert scale_inv[0].isnan() and quantized[:128].eq(127).all()
    assert torch.equal(blocks8.decode(quantized, scale_inv)[128:], x[128:])
