"""States: every format on every kind of block, and the one hazard, a zero root beside a moment."""

from __future__ import annotations

import pytest
import torch

from ds_fp8.levels import STATE_BYTES, STATE_FORMATS
from ds_fp8.numerics import states
from ds_fp8.numerics.random_bits import Stochastic

TOLERANCE = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11 * 1.001, "e4m3": 2.0**-4 * 1.001, "e4m3_expanded": 0.12}
"""Half an ulp. Expanded: the smallest of a block is e4m3's smallest code, half a step of it is 1/2, and k = 4 divides that."""


def narrow(numel=300, seed=0):
    """Magnitudes within a factor of 20: all normal in every format."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(torch.rand(numel, generator=generator) * 3 - 10)


@pytest.mark.parametrize("fmt", STATE_FORMATS)
def test_what_is_written_is_read(fmt):
    values = narrow()
    state = states.new_state(fmt, 300, "cpu")
    assert states.read(state).eq(0).all()
    states.write(state, values)
    assert torch.allclose(states.read(state), values, rtol=TOLERANCE[fmt], atol=0)
    states.write(state, values, Stochastic(1, 1, 1))
    assert torch.allclose(states.read(state), values, rtol=2.1 * TOLERANCE[fmt], atol=0)


@pytest.mark.parametrize("fmt", STATE_FORMATS)
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
    """sqrt(v) of 1e-12: plain fp16 ends at 6e-8; the block's scale brings it to the middle of the range."""
    root = torch.full((128,), 1e-12)
    state = states.new_state("fp16", 128, "cpu")
    states.write_root(state, root)
    assert torch.allclose(states.read(state), root, rtol=2.0**-11)


def test_moments_are_m_and_v_whatever_is_stored():
    m, v = narrow(seed=1), narrow(seed=2)
    for fmt in STATE_FORMATS:
        exp_avg, exp_avg_sq = states.new_state(fmt, 300, "cpu"), states.new_state(fmt, 300, "cpu")
        states.write(exp_avg, m)
        if fmt in states.ROOT_FORMATS:
            states.write_root(exp_avg_sq, v.sqrt())
        else:
            states.write(exp_avg_sq, v)
        found = states.read_moments(exp_avg, exp_avg_sq)
        assert torch.allclose(found[0], m, rtol=TOLERANCE[fmt])
        assert torch.allclose(found[1], v, rtol=2.1 * TOLERANCE[fmt])


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="int8"):
        states.new_state("int8", 3, "cpu")
