"""Recipes as objects: what their entry says and what their file does agree; how a range of a weight is cut into
tiles.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from ds_fp8.formats import E4M3
from ds_fp8.layers.operands import ROWS, TENSOR
from ds_fp8.layers.recipes import scaling_of
from ds_fp8.layers.recipes.owner import Segment, measure_tiles, quantize_tiles, row_runs, tiles_of
from ds_fp8.numerics.gemm_blocks import block_scale, quantize_128x128
from ds_fp8.recipe import OUR_RECIPES, RECIPE_KINDS, TE_RECIPES


@pytest.mark.parametrize("name", RECIPE_KINDS)
def test_the_entry_and_the_file_of_a_recipe_agree(name):
    """Who computes it, whether data of weights can be made outside of the layer, what one scale covers."""
    facts, scaling = RECIPE_KINDS[name], scaling_of(name)
    assert bool(scaling.te_class) == (name in TE_RECIPES)
    if name in OUR_RECIPES:
        assert (facts.scale_extent == "tensor") == (scaling.input_extent == TENSOR)
        assert (facts.scale_extent == "row") == (scaling.input_extent == ROWS)
        assert scaling.transposes == (scaling.carried_scale_shape(64, 32) == (2, 4))
        made_elsewhere = type(scaling).quantize_frozen is not type(scaling).__mro__[-2].quantize_frozen
        assert made_elsewhere == (not facts.not_by_owner)


def test_runs_of_a_range_are_parts_of_a_row_or_whole_rows_of_one_row_of_tiles():
    """[start, start + numel) of a matrix 300 wide: every element once, in order; no run crosses row 128 or 256."""
    width = 300
    for start, numel in ((0, 300 * 260), (7, 12), (299, 302), (127 * 300 + 5, 600), (0, 0)):
        runs, at = row_runs(start, numel, width), 0
        for offset, length, row, column, rows in runs:
            assert offset == at and start + offset == row * width + column
            assert rows == 1 or (column == 0 and length == rows * width)
            assert row // 128 == (row + rows - 1) // 128
            at += length
        assert at == numel


def test_owners_of_parts_make_the_tiles_of_the_whole():
    """Three ranks that own 260 x 200 in odd parts: their amaxes MAXed, their data side by side, are
    `quantize_128x128`'s.
    """
    torch.manual_seed(0)
    whole = torch.randn(260, 200).bfloat16()
    exact, scale_inv = quantize_128x128(whole, E4M3)
    weight = type("Weight", (), {"shape": (260, 200)})
    data, amaxes = torch.zeros(whole.numel(), dtype=torch.uint8), torch.zeros(tiles_of(weight.shape))
    borders = [0, 12345, 40001, whole.numel()]
    parts = [
        Segment(weight, first, whole.view(-1)[first:last], data[first:last])
        for first, last in itertools.pairwise(borders)
    ]
    for part in parts:
        measure_tiles(part, amaxes)
    scales = block_scale(amaxes, E4M3, power_of_two=True)
    assert torch.equal(torch.reciprocal(scales), scale_inv)
    for part in parts:
        quantize_tiles(part, scales)
    assert torch.equal(data.view(260, 200), exact.view(torch.uint8))
