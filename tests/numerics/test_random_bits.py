"""Random bits: golden words, the law of stochastic rounding, and what is never rounded away."""

from __future__ import annotations

import math

import pytest
import torch

from ds_fp8.formats import E4M3, E5M2
from ds_fp8.numerics import blocks8, blocks16, flat
from ds_fp8.numerics.random_bits import Stochastic, mix, mix_tensor
from ds_fp8.numerics.states import round_bf16

DRAWS = 4096


def test_golden_words():
    """Constants of the mix, so that no platform may change them: resume depends on every bit."""
    assert [mix(0), mix(1), mix(2), mix(0xFFFFFFFF)] == [0, 0x688990C0, 0xD1132181, 0x6768824A]
    words = torch.tensor([0, 1, 2, 0xFFFFFFFF])
    assert mix_tensor(words).tolist() == [mix(int(word)) for word in words]
    source = Stochastic(seed=7, step=3, stream=1)
    assert source.bits(3, torch.device("cpu")).tolist() == [0x62AD78BE, 0xB464EBD6, 0xEC0F7205]
    assert source.bits(3, torch.device("cpu")).tolist() == [mix(i ^ mix(7 ^ mix(3 ^ mix(1)))) for i in range(3)]
    assert source.at(2).bits(1, torch.device("cpu")).tolist() == source.bits(3, torch.device("cpu")).tolist()[2:]


def test_bits_are_fair_and_streams_differ():
    """Each of the 32 bits is set in half of 2^16 words within five sigma (256); no two streams share words."""
    device = torch.device("cpu")
    words = [Stochastic(1, 1, stream).bits(1 << 16, device) for stream in (1, 2, 3)]
    for bit in range(32):
        assert abs((words[0] >> bit & 1).sum().item() - 2**15) < 5 * 128
    assert (words[0] == words[1]).sum() < 3
    assert (words[1] == words[2]).sum() < 3


CASES = {
    "e4m3": lambda x, source: flat.decode(*flat.encode(x, E4M3, rounding=source), E4M3),
    "e5m2": lambda x, source: flat.decode(*flat.encode(x, E5M2, rounding=source), E5M2),
    "int8": lambda x, source: blocks8.decode(*blocks8.encode(x, rounding=source)),
    "fp16 blocks": lambda x, source: blocks16.decode(*blocks16.encode(x, rounding=source)),
    "bf16": lambda x, source: round_bf16(x, source).float(),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("value", [0.7123, -0.0317, 3.1e-6])
def test_the_mean_is_the_value(name, value):
    """Two neighbours only, and a mean within five sigma of the value: sigma <= step / (2 sqrt(draws))."""
    x = torch.full((DRAWS,), value)
    x[::128] = 1.0  # every block has the same amax, so every other element meets the same grid
    rounded = CASES[name](x, Stochastic(3, 5, 1))[x != 1.0]
    found = rounded.unique()
    assert len(found) == 2
    assert found[0] <= value <= found[1]
    step = (found[1] - found[0]).item()
    assert abs(rounded.double().mean().item() - value) <= 5 * step / (2 * math.sqrt(len(rounded)))


@pytest.mark.parametrize("name", CASES)
def test_values_on_the_grid_stay(name):
    """A fraction of zero is never rounded up; the largest value does not leave the range; NaN stays."""
    x = torch.full((256,), 2.0)
    x[1], x[2] = 0.0, -2.0
    assert torch.equal(CASES[name](x, Stochastic(1, 1, 1)), x)
    x[:128] = math.nan
    back = CASES[name](x, Stochastic(1, 1, 1))
    assert back[:128].isnan().all()
    assert torch.equal(back[128:], x[128:])


def test_same_integers_same_bits():
    """Nothing is hidden: seed, step and stream are the whole state, and each of them matters."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    first = flat.encode(x, E4M3, rounding=Stochastic(1, 2, 3))[0]
    assert torch.equal(first, flat.encode(x, E4M3, rounding=Stochastic(1, 2, 3))[0])
    for other in (Stochastic(2, 2, 3), Stochastic(1, 3, 3), Stochastic(1, 2, 1)):
        assert not torch.equal(first, flat.encode(x, E4M3, rounding=other)[0])
