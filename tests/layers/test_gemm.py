"""The product of quantized values: exact in its operands, rounded once, NaN never lost."""

from __future__ import annotations

import pytest
import torch

from ds_fp8.formats import E4M3, E5M2
from ds_fp8.kernels import quantize, quantize_1x128, quantize_128x128
from ds_fp8.layers.gemm import matmul
from ds_fp8.layers.operands import GROUPS, TENSOR, TILES, Operand
from ds_fp8.numerics.gemm_blocks import dequantize_1x128, dequantize_128x128


def operands(rows: int = 24, inner: int = 256, columns: int = 40) -> tuple[Operand, Operand]:
    torch.manual_seed(0)
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    return (
        Operand(quantize(left, 3000.0, E5M2), torch.tensor(1 / 3000)),
        Operand(quantize(right, 77.0, E4M3), torch.tensor(1 / 77)),
    )


def exact(a: Operand, b: Operand) -> torch.Tensor:
    return a.decode(torch.float32).double() @ b.decode(torch.float32).double().t()


@pytest.mark.parametrize("with_bias", [False, True])
def test_bf16_is_rounded_once(with_bias):
    """The correctly rounded result, but for sums within fp32's error of a tie: fewer than one in a thousand."""
    a, b = operands()
    bias = torch.randn(40).bfloat16() if with_bias else None
    wanted = exact(a, b) * (a.scale_inv * b.scale_inv).double()
    wanted = (wanted if bias is None else wanted + bias.double()).bfloat16()
    found = matmul(a, b, torch.bfloat16, bias=bias)
    assert (found != wanted).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wider_formats_keep_their_bits(dtype):
    """An fp32 sum of 256 products is off by at most 256 roundings of the largest partial sum; then one of the
    output.
    """
    a, b = operands()
    factor = (a.scale_inv * b.scale_inv).double()
    size = a.decode(torch.float32).abs().double() @ b.decode(torch.float32).abs().double().t() * factor
    bound = 256 * 2.0**-24 * size + torch.finfo(dtype).eps * size
    assert ((matmul(a, b, dtype).double() - exact(a, b) * factor).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [4, 48, 128])
def test_a_scale_of_nan_is_not_lost(dtype, rows):
    """MKL's sgemm drops an alpha of NaN (torch 2.13): the factor must not go in that way."""
    a, b = operands(rows, 128, 64)
    overflowed = Operand(a.data, torch.tensor(torch.nan))
    assert matmul(overflowed, b, dtype).isnan().all()


def test_transposed_operands_are_the_same_product():
    a, b = operands()
    transposed = Operand(a.data.t().contiguous().t(), a.scale_inv)
    assert torch.equal(matmul(a, b, torch.float32), matmul(transposed, b, torch.float32))
    assert torch.equal(a.t().decode(torch.float32), a.decode(torch.float32).t())


def test_block_scales_are_applied_on_decoding():
    """1x128 groups times 128x128 tiles, with short edges; powers of two, so bf16 operands are exact as well."""
    torch.manual_seed(0)
    left, right = torch.randn(24, 144) * torch.logspace(-3, 3, 144), torch.randn(80, 144)
    a, b = Operand(*quantize_1x128(left, E4M3), GROUPS), Operand(*quantize_128x128(right, E4M3), TILES)
    assert torch.equal(a.decode(torch.bfloat16).float(), a.decode(torch.float32))
    torch.testing.assert_close(matmul(a, b, torch.float32).double(), exact(a, b), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, columns", [(128, 256), (256, 128), (16, 384), (100, 200)])
def test_fast_block_decode_is_the_reference(rows, columns, dtype):
    """Whole blocks take another way to the same bits, whichever way round they lie."""
    x = torch.randn(rows, columns) * torch.logspace(-12, 12, columns)
    groups, tiles = Operand(*quantize_1x128(x, E4M3), GROUPS), Operand(*quantize_128x128(x, E4M3), TILES)
    assert torch.equal(groups.decode(dtype), dequantize_1x128(groups.data, groups.scale_inv, dtype))
    wanted = dequantize_128x128(tiles.data, tiles.scale_inv, dtype)
    assert torch.equal(tiles.decode(dtype), wanted) and torch.equal(tiles.t().decode(dtype), wanted.t())


@pytest.mark.parametrize("rows, inner, columns", [(0, 32, 16), (16, 0, 32), (16, 32, 0)])
def test_empty_products(rows, inner, columns):
    a = Operand(torch.zeros(rows, inner).to(torch.float8_e4m3fn), torch.tensor(1.0), TENSOR)
    b = Operand(torch.zeros(columns, inner).to(torch.float8_e4m3fn), torch.tensor(1.0), TENSOR)
    assert matmul(a, b, torch.float32).shape == (rows, columns)
    assert not matmul(a, b, torch.float32).any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "rows, inner, columns", [(16, 32, 48), (7, 32, 48), (16, 24, 48), (16, 32, 40), (1000, 512, 256)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaled_mm_equals_the_emulation(rows, inner, columns, dtype):
    """torch._scaled_mm, padded where it must be, against the decoded product: Hopper sums with about 14 bits."""
    a, b = operands(rows, inner, columns)
    bias = torch.randn(columns).to(dtype)
    wanted = matmul(a, b, dtype, bias=bias)
    on_gpu = [Operand(operand.data.cuda(), operand.scale_inv.cuda()) for operand in (a, b)]
    found = matmul(*on_gpu, dtype, bias=bias.cuda()).cpu()
    size = a.decode(torch.float32).abs() @ b.decode(torch.float32).abs().t() * (a.scale_inv * b.scale_inv)
    bound = 2 * torch.finfo(dtype).eps * wanted.abs().float() + 2.0**-12 * size
    assert ((found.float() - wanted.float()).abs() <= bound).all()
