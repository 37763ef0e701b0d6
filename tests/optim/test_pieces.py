"""A gradient in pieces gives the bits of a flat one, and is freed while the step goes."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ds_fp8.levels import LEVELS
from ds_fp8.numerics.random_bits import ADAM_STREAM, Stochastic, mix, seed_at, unmix
from ds_fp8.optim import ScaledAdamW, ScaledLion, pieces

SIZES = (1000, 24, 3 * 4096, 1, 2303, 4096)
"""Pieces that end inside of blocks, inside of chunks, and at both; a chunk is of 4096 elements here."""


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(pieces, "CPU_NUMEL", 4096)


def stepped(make, level, dtype, in_pieces, pad=0):
    """The parameter and its state after three steps."""
    generator = torch.Generator().manual_seed(1)
    numel = sum(SIZES) + pad
    param = torch.nn.Parameter(torch.randn(numel, generator=generator).to(dtype))
    optimizer = make([param], lr=1e-2, weight_decay=0.1, level=level, seed=5)
    for _ in range(3):
        optimizer.grad_scale = 0.5
        parts = [torch.randn(size, generator=generator) for size in SIZES]
        if in_pieces:
            optimizer.gradients[param] = pieces.Pieces(parts, numel)
        else:
            optimizer.gradients[param] = torch.cat([*parts, torch.zeros(pad)])
        optimizer.step()
    return param, optimizer.state[param]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", [ScaledAdamW, ScaledLion])
@pytest.mark.parametrize(
    "level",
    [
        LEVELS["O1"],
        LEVELS["O2"],
        LEVELS["O2"].override(rounding="stochastic"),
        LEVELS["O2"].override(exp_avg="e4m3_expanded", exp_avg_sq="e4m3_expanded", master="fp16"),
    ],
    ids=["O1", "O2", "stochastic", "expanded-fp16"],
)
def test_pieces_are_the_flat_gradient_to_the_bit(level, make, dtype):
    """Nearest and stochastic rounding, all kinds of states and masters, a partition with a padded end."""
    for pad in (0, 500):
        flat, flat_state = stepped(make, level, dtype, in_pieces=False, pad=pad)
        param, state = stepped(make, level, dtype, in_pieces=True, pad=pad)
        assert torch.equal(param.view(torch.uint8), flat.view(torch.uint8))
        assert state.keys() == flat_state.keys()
        for key, value in flat_state.items():
            same = (
                torch.equal(state[key].view(torch.uint8), value.view(torch.uint8))
                if key
                not in (
                    "step",
                    "partition",
                )
                else state[key] == value
            )
            assert same, key


def test_a_piece_is_gone_once_its_elements_are_stepped():
    parts = [torch.randn(4096) for _ in range(4)]
    alive = [StorageWeakRef(part.untyped_storage()) for part in parts]
    given = pieces.Pieces(parts, 4 * 4096)
    del parts
    left = []
    for _, grad in given.chunks():
        del grad
        gc.collect()
        left.append(sum(not one.expired() for one in alive))
    assert left == [3, 2, 1, 0]


def test_a_chunk_draws_the_words_of_its_partition():
    """first + i = first ^ i where `first` is a multiple of 4096 and i is below it: the seed carries `first`."""
    whole = Stochastic(7, 3, ADAM_STREAM).bits(4 * 4096, torch.device("cpu"))
    for first in (0, 4096, 8192, 12288):
        seed = seed_at(first, 7, 3, ADAM_STREAM)
        assert torch.equal(
            Stochastic(seed, 3, ADAM_STREAM).bits(4096, torch.device("cpu")), whole[first : first + 4096]
        )
    assert all(unmix(mix(word)) == word for word in (0, 1, 0xDEADBEEF, 0xFFFFFFFF))
