"""`numerics` against Transformer Engine's own cast kernels on an H200, bit for bit: quantized values and scales of
every recipe.
"""

from __future__ import annotations

import io
import lzma
from functools import cache
from pathlib import Path

import pytest
import torch

from ds_fp8 import numerics
from ds_fp8.formats import E4M3, E5M2
from ds_fp8.numerics import gemm_blocks

FORMATS = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)


@cache
def recorded() -> dict:
    data = lzma.decompress((Path(__file__).parent / "te_casts.pt.xz").read_bytes())
    return torch.load(io.BytesIO(data), weights_only=True)


def every_bf16() -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 values with one NaN: the device drops its sign."""
    return torch.where(tensor.float().isnan(), torch.tensor(0x7F, dtype=torch.uint8), tensor.view(torch.uint8))


@FORMATS
@pytest.mark.parametrize("scale", [1.0, 3.7])
def test_delayed_casts(fmt, scale):
    """All 65536 bf16 values: saturation, infinities, subnormals, ties; and fp32 over 24 binades."""
    case = recorded()[f"delayed {fmt.name} scale {scale} every_bf16"]
    assert torch.equal(quantized(numerics.quantize(every_bf16(), torch.tensor(scale), fmt)), case["_data"])
    case = recorded()[f"delayed {fmt.name} scale {scale} spread"]
    assert torch.equal(quantized(numerics.quantize(recorded()["spread"], torch.tensor(scale), fmt)), case["_data"])
    assert torch.equal(1 / torch.tensor([scale]), case["_scale_inv"])


@FORMATS
def test_current_casts(fmt):
    """scale = max / amax, scale_inv = 1 / scale: not amax / max, which differs in the last bit."""
    spread, case = recorded()["spread"], recorded()[f"current {fmt.name} spread"]
    scale = numerics.scale_from_amax(numerics.amax(spread), fmt)
    assert torch.equal(quantized(numerics.quantize(spread, scale, fmt)), case["_data"])
    assert torch.equal(torch.reciprocal(scale).reshape(1), case["_scale_inv"])


@FORMATS
@pytest.mark.parametrize("power_of_two", [True, False])
def test_block_casts(fmt, power_of_two):
    """Groups along both axes and tiles; TE keeps scales transposed and pads their rows to four."""
    spread, kind = recorded()["spread"], "power of two" if power_of_two else "exact"
    one = recorded()[f"block1d {fmt.name} {kind} spread"]
    rows, rows_inverse = gemm_blocks.quantize_1x128(spread, fmt, power_of_two=power_of_two)
    columns, columns_inverse = gemm_blocks.quantize_1x128(spread.t().contiguous(), fmt, power_of_two=power_of_two)
    tiles, tiles_inverse = gemm_blocks.quantize_128x128(spread, fmt, power_of_two=power_of_two)
    assert torch.equal(quantized(rows), one["_rowwise_data"])
    assert torch.equal(quantized(columns), one["_columnwise_data"])
    two = recorded()[f"block2d {fmt.name} {kind} spread"]
    assert torch.equal(quantized(tiles), two["_rowwise_data"])
    # Exact scales: TE's device division is one ulp off for some groups; powers of two, its default, are equal.
    same = torch.equal if power_of_two else lambda a, b: torch.allclose(a, b, rtol=2**-22, atol=0)
    assert same(rows_inverse.t().contiguous(), one["_rowwise_scale_inv"])
    assert same(columns_inverse.t().contiguous(), one["_columnwise_scale_inv"])
    assert same(tiles_inverse, two["_rowwise_scale_inv"][:, :2])
