"""Golden: all 256 codes of both formats, from the definition of the formats; and what happens at the edges."""

from __future__ import annotations

import math

import pytest
import torch

from ds_fp8.formats import E4M3, E5M2, FORMATS
from ds_fp8.numerics import amax, dequantize, quantize
from ds_fp8.numerics.dtypes import as_quantized, format_of, torch_dtype

BIAS = {"e4m3": 7, "e5m2": 15}


def golden_values(fmt):
    """The 256 values by arXiv 2209.05433, table 1: sign, exponent, mantissa; NaN and infinity where it says so."""
    values = []
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent = code >> fmt.mantissa_bits & (0x7F >> fmt.mantissa_bits)
        mantissa = code & ((1 << fmt.mantissa_bits) - 1)
        fraction = mantissa / (1 << fmt.mantissa_bits)
        if fmt is E4M3 and code & 0x7F == 0x7F:
            values.append(math.nan)
        elif fmt is E5M2 and exponent == 31:
            values.append(sign * math.inf if mantissa == 0 else math.nan)
        elif exponent == 0:
            values.append(sign * fraction * 2.0 ** (1 - BIAS[fmt.name]))
        else:
            values.append(sign * (1 + fraction) * 2.0 ** (exponent - BIAS[fmt.name]))
    return torch.tensor(values)


def all_quantized(fmt):
    return as_quantized(torch.arange(256, dtype=torch.uint8), fmt)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
class TestGolden:
    def test_every_code_means_what_the_paper_says(self, fmt):
        """256 codes, none excepted; -0.0 keeps its sign."""
        decoded, golden = dequantize(all_quantized(fmt), 1.0), golden_values(fmt)
        assert torch.equal(decoded.isnan(), golden.isnan())
        finite = ~golden.isnan()
        assert torch.equal(decoded[finite].view(torch.int32), golden[finite].view(torch.int32))

    def test_every_finite_value_comes_back_as_its_code(self, fmt):
        golden = golden_values(fmt)
        finite = golden.isfinite()
        assert torch.equal(
            quantize(golden, 1.0, fmt).view(torch.uint8)[finite], torch.arange(256, dtype=torch.uint8)[finite]
        )

    def test_ties_go_to_the_even_code_and_neighbours_to_the_nearest(self, fmt):
        """The middle between two FP8 values is exact in fp32: there the even code wins, a bit beside it the nearer
        one.
        """
        golden = golden_values(fmt)
        positive = golden[:128][golden[:128].isfinite()]
        low, high = positive[:-1], positive[1:]
        middle = (low + high) / 2
        code = torch.arange(len(low), dtype=torch.uint8)
        even = torch.where(code % 2 == 0, code, code + 1)
        up, down = torch.full_like(middle, torch.inf), torch.zeros_like(middle)
        assert torch.equal(quantize(middle, 1.0, fmt).view(torch.uint8), even)
        assert torch.equal(quantize(torch.nextafter(middle, up), 1.0, fmt).view(torch.uint8), code + 1)
        assert torch.equal(quantize(torch.nextafter(middle, down), 1.0, fmt).view(torch.uint8), code)

    def test_overflow_and_infinity_saturate_and_nan_stays(self, fmt):
        """Decided by us, not by the cast: torch on CPU and on a GPU disagree about it."""
        quantized = quantize(torch.tensor([2 * fmt.max, 1e38, math.inf, -math.inf, math.nan]), 1.0, fmt)
        assert quantized.float()[:4].tolist() == [fmt.max, fmt.max, fmt.max, -fmt.max]
        assert quantized.float()[4].isnan()

    def test_values_below_half_the_smallest_become_zero(self, fmt):
        half = fmt.min_subnormal / 2
        quantized = quantize(torch.tensor([half, half * (1 + 2**-20), -half, 0.0, -0.0]), 1.0, fmt)
        assert quantized.float().tolist() == [0.0, fmt.min_subnormal, 0.0, 0.0, 0.0]
        assert quantized.view(torch.uint8).tolist() == [0, 1, 0x80, 0, 0x80]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_relative_error_is_half_an_ulp(self, fmt, dtype):
        """|x - back| <= |x| * 2^-(mantissa_bits + 1) for normals; the scale is a power of two, so it adds nothing."""
        x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
        back = dequantize(quantize(x, 32.0, fmt), 1 / 32)
        normal = x.float().abs() * 32 >= fmt.min_normal
        assert ((back - x.float()).abs() <= x.float().abs() * fmt.half_ulp)[normal].all()


class TestAmax:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_largest_magnitude(self, dtype):
        assert amax(torch.tensor([[1.0, -3.0], [2.0, 0.5]], dtype=dtype)).item() == 3.0

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_anything_not_finite_is_infinity(self, bad):
        """NCCL's MAX ignores NaN; infinity survives every reduction."""
        assert amax(torch.tensor([1.0, bad, 2.0])).item() == math.inf

    def test_empty_is_zero(self):
        assert amax(torch.empty(0, 5)).item() == 0.0


def test_formats_and_dtypes_match():
    """The facts on floor 0 against torch's own."""
    for fmt in FORMATS.values():
        info = torch.finfo(torch_dtype(fmt))
        assert (info.max, info.smallest_normal) == (fmt.max, fmt.min_normal)
        assert info.smallest_normal * 2.0**-fmt.mantissa_bits == fmt.min_subnormal
        assert torch.empty(0, dtype=torch_dtype(fmt)).element_size() == fmt.bytes
        assert format_of(torch_dtype(fmt)) is fmt
    with pytest.raises(ValueError, match="int64"):
        format_of(torch.int64)
