"""Bit-for-bit tests of the C++ casts: every path gives the bits of the PyTorch reference, tails and odd values
included.

Bits, not tolerances: a run on one machine must be repeatable on another, and a job that compiles the kernels must train
exactly as one that cannot. (All 2^32 fp32 inputs: `benchmarks/bench_codec.py --exhaustive`.)
"""

from __future__ import annotations

import pytest
import torch

from ds_fp8.formats import E4M3, E5M2, FORMATS
from ds_fp8.kernels import cpu
from ds_fp8.kernels.cpu import casts, loader
from ds_fp8.kernels.cpu import flat as fast_flat
from ds_fp8.numerics import cast, flat, gemm_blocks
from ds_fp8.numerics.dtypes import torch_dtype
from ds_fp8.numerics.random_bits import Stochastic

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler on this machine")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 2.0**-10, -(2.0**-10), 2.0**-9, 448.0, 464.0, -465.0, 57344.0, 61440.0, 61441.0,
           1e30, float("inf"), -float("inf"), float("nan"), 3.4e38, 1.1754944e-38)  # fmt: skip


@pytest.fixture(params=["portable", "avx2", "avx512"])
def path(request):
    """Each path that this CPU has; the best one again afterwards."""
    if loader.choose(request.param) != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    loader.choose("avx512")


@pytest.fixture(params=[E4M3, E5M2], ids=lambda fmt: fmt.name)
def fmt(request):
    return request.param


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def same_values(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bits, but one NaN is as good as another: their payload differs between two paths inside torch itself."""
    return left.dtype == right.dtype and torch.equal(
        torch.nan_to_num(left.float(), nan=12345.0), torch.nan_to_num(right.float(), nan=12345.0)
    )


def samples(numel: int, seed: int = 0, spread: float = 4.0) -> torch.Tensor:
    """Lognormal magnitudes, so that subnormals and saturation both occur."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.randn(numel, generator=generator).mul(spread).exp()
    return magnitude * torch.randn(numel, generator=generator).sign()


def test_nearest_cast_of_a_strided_sample_of_all_fp32_patterns(path, fmt):
    """2^32 / 257 = 16.7 million bit patterns, every exponent and many mantissas, NaNs and infinities among them."""
    for begin in range(-(2**31), 2**31, 2**29):
        x = torch.arange(begin, begin + 2**29, 257 * 4, dtype=torch.int64).to(torch.int32).view(torch.float32)
        assert same_bits(casts.quantize(x, 1.0, fmt), cast.quantize(x, 1.0, fmt))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 127, 128, 129, 1000])
def test_quantize_measures_amax_in_the_same_pass(path, fmt, dtype, numel):
    x = samples(numel, seed=numel).to(dtype)
    scale = torch.tensor(0.37)
    quantized, amax = casts.quantize_with_amax(x, scale, fmt)
    assert same_bits(quantized, cast.quantize(x, scale, fmt))
    assert torch.equal(amax, cast.amax(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_values(path, fmt, dtype):
    """Zeros keep their sign, infinity saturates, NaN stays NaN, and amax reports both as infinity."""
    x = torch.tensor(SPECIAL).to(dtype)
    quantized = casts.quantize(x, 1.0, fmt)
    assert same_values(quantized, cast.quantize(x, 1.0, fmt))
    assert same_bits(quantized[~x.isnan()], cast.quantize(x, 1.0, fmt)[~x.isnan()])
    for value in (float("nan"), float("inf"), -float("inf")):
        assert casts.amax(torch.tensor([1.0, value, 2.0], dtype=dtype)) == torch.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_256_codes_decode_as_in_the_reference(path, fmt, dtype):
    quantized = torch.arange(256, dtype=torch.uint8).view(torch_dtype(fmt))
    for scale_inv in (1.0, 0.37, 2.0**-126, 1e-3):
        decoded = casts.dequantize(quantized, torch.tensor(scale_inv), dtype)
        assert same_values(decoded, cast.dequantize(quantized, torch.tensor(scale_inv), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 5, 128, 300, 4096 + 17])
def test_flat_round_trip(path, fmt, dtype, numel):
    """Nearest and stochastic; the random bits are a function of the element's number, so those agree too."""
    x = samples(numel, seed=1 + numel).to(dtype)
    for rounding in (None, Stochastic(seed=7, step=3, stream=1), Stochastic(1, 2, 3, first=2**32 - 200)):
        quantized, scale_inv = fast_flat.encode(x, fmt, rounding=rounding)
        expected, expected_scale_inv = flat.encode(x, fmt, rounding=rounding)
        assert torch.equal(quantized, expected)
        assert same_values(scale_inv, expected_scale_inv)
        for out in DTYPES:
            values = fast_flat.decode(quantized, scale_inv, fmt, dtype=out)
            assert same_values(values, flat.decode(quantized, scale_inv, fmt, dtype=out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 127, 128, 4096 + 17])
def test_best_of_two_chooses_the_same_scale(path, fmt, dtype, numel):
    """The squared errors that decide are summed in one order, whatever the width of a vector; no padding is judged."""
    x = samples(numel, seed=2 + numel).to(dtype)
    quantized, scale_inv = torch.empty(numel, dtype=torch.uint8), torch.empty(flat.blocks_of(numel))
    found = fast_flat.encode(x, fmt, best_of_two=True, out=(quantized, scale_inv))
    expected, expected_scale_inv = flat.encode(x, fmt, best_of_two=True)
    assert found[0] is quantized and torch.equal(quantized, expected)
    assert same_values(scale_inv, expected_scale_inv)


def test_flat_blocks_that_are_zero_tiny_or_not_finite(path, fmt):
    """A zero block and one of subnormals stay finite; NaN or inf spoils exactly its own block."""
    x = samples(7 * 128, seed=3)
    x[:128] = 0.0
    x[128:256] = 1e-42
    x[300] = float("nan")
    x[500] = -float("inf")
    x[640:768] = 3.4e38
    quantized, scale_inv = fast_flat.encode(x, fmt, best_of_two=True)
    expected, expected_scale_inv = flat.encode(x, fmt, best_of_two=True)
    assert torch.equal(quantized, expected)
    assert same_values(scale_inv, expected_scale_inv)
    quantized, scale_inv = fast_flat.encode(x, fmt)
    expected, expected_scale_inv = flat.encode(x, fmt)
    assert torch.equal(quantized, expected)
    assert same_values(scale_inv, expected_scale_inv)
    assert scale_inv.isnan().tolist() == [False, False, True, True, False, False, False]
    assert same_values(fast_flat.decode(quantized, scale_inv, fmt), flat.decode(quantized, scale_inv, fmt))


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("numel", [1, 128, 1000])
def test_sum_over_ranks(path, fmt, world_size, numel):
    """In rank order, in fp32, times the factor; the requantized sum is `encode` of it. Rows may be strided."""
    encoded = [flat.encode(samples(numel, seed=rank), fmt) for rank in range(world_size)]
    quantized = torch.zeros(world_size, numel + 13, dtype=torch.uint8)[:, :numel]
    scale_inv = torch.stack([scales for _, scales in encoded])
    for rank, (row, _) in enumerate(encoded):
        quantized[rank] = row
    own = samples(numel, seed=99)
    for dtype in DTYPES:
        out = torch.empty(numel, dtype=dtype)
        fast_flat.sum_contributions(quantized, scale_inv, fmt, factor=1 / world_size, out=out)
        expected = flat.sum_contributions(quantized, scale_inv, fmt, factor=1 / world_size, out=torch.empty_like(out))
        assert same_values(out, expected)
        mine = own.to(dtype)
        expected = flat.sum_contributions(quantized, scale_inv, fmt, factor=0.3, own=mine)
        assert same_values(fast_flat.sum_contributions(quantized, scale_inv, fmt, 0.3, own=mine), expected)
    for out_fmt, how in ((None, {}), (E5M2, {}), (None, {"own": own.bfloat16(), "best_of_two": True})):
        got = fast_flat.sum_and_encode(quantized, scale_inv, fmt, factor=0.3, out_fmt=out_fmt, **how)
        expected_pair = flat.sum_and_encode(quantized, scale_inv, fmt, factor=0.3, out_fmt=out_fmt, **how)
        assert torch.equal(got[0], expected_pair[0])
        assert torch.equal(got[1], expected_pair[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape", [(1, 128), (3, 130), (256, 384), (130, 65)])
def test_gemm_tiles(path, fmt, dtype, power_of_two, shape):
    """1x128 and 128x128, edges short; a tile of zeros has scale 1."""
    x = samples(shape[0] * shape[1], seed=shape[1]).view(shape).to(dtype)
    x[:1, :100] = 0.0
    x[-1, -1] = 1e-7
    for name in ("1x128", "128x128"):
        quantize, dequantize = getattr(casts, f"quantize_{name}"), getattr(casts, f"dequantize_{name}")
        quantized, scale_inv = quantize(x, fmt, power_of_two=power_of_two)
        expected = getattr(gemm_blocks, f"quantize_{name}")(x, fmt, power_of_two=power_of_two)
        assert same_values(scale_inv, expected[1])
        assert same_bits(quantized, expected[0])
        for out in DTYPES:
            back = getattr(gemm_blocks, f"dequantize_{name}")(quantized, scale_inv, out)
            assert same_values(dequantize(quantized, scale_inv, out), back)


def test_three_axes_and_strided_inputs(path):
    x = samples(4 * 6 * 200).view(4, 6, 200)
    for view in (x, x.transpose(0, 1), x[:, ::2]):
        assert same_bits(casts.quantize(view, 2.0, E4M3).contiguous(), cast.quantize(view, 2.0, E4M3).contiguous())
        quantized, scale_inv = casts.quantize_1x128(view, E4M3)
        expected = gemm_blocks.quantize_1x128(view, E4M3)
        assert same_bits(quantized, expected[0].contiguous())
        assert torch.equal(scale_inv, expected[1])


def test_threads_do_not_change_a_bit(path):
    """Two threads share one tensor by contiguous ranges of blocks; a block never straddles them."""
    x = samples(1 << 20)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fast_flat.encode(x, E4M3, rounding=Stochastic(1, 2, 3)))
    finally:
        torch.set_num_threads(before)
    for quantized, scale_inv in results[1:]:
        assert torch.equal(quantized, results[0][0])
        assert torch.equal(scale_inv, results[0][1])


def test_formats_of_the_jobs_are_the_formats_of_the_package():
    assert {name for name, fmt in FORMATS.items() if fmt.bytes == 1} == {"e4m3", "e5m2"}
