"""The casts on CPU tensors: same names, arguments and bits as `ds_fp8.numerics`, by the C++ kernels.

Callers come through `ds_fp8.kernels`, which looks at the device and asks `loader.load()` first; here the library is
taken to be there. Inputs of any stride are taken; outputs are contiguous. ctypes releases the GIL during a call.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...formats import BLOCK_SIZE, Format
from ...numerics.flat import blocks_of
from . import jobs, loader

GRAIN_BLOCKS = 256
"""Blocks of 128 that are worth a thread: 32K elements, some ten microseconds."""

STREAMING_BYTES = 1 << 25
"""Outputs above this bypass the cache: they would not be there any more when somebody reads them."""


def run(operation: int, job: ctypes.Structure, units: int, grain: int = GRAIN_BLOCKS) -> None:
    """Run a job over all its units with PyTorch's number of threads."""
    lib = loader.load()
    assert lib is not None, "the caller asks loader.load() first"
    if units > 0:
        lib.ds_fp8_run(operation, ctypes.byref(job), units, grain, torch.get_num_threads())


def _float8(fmt: Format) -> torch.dtype:
    return getattr(torch, fmt.torch_name)


def format_name(quantized: Tensor) -> str:
    """e4m3 or e5m2, from the dtype of a float8 tensor."""
    return {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}[quantized.dtype]


def readable(x: Tensor) -> Tensor:
    """x, contiguous, in a dtype that the kernels read; other dtypes go through fp32, as in the reference."""
    return (x if x.dtype in jobs.DTYPES else x.float()).contiguous()


def _scalar(scale: Tensor | float) -> Tensor:
    if isinstance(scale, Tensor):
        return scale.detach().to(torch.float32).reshape(())
    return torch.tensor(scale, dtype=torch.float32, device="cpu")


def quantize(x: Tensor, scale: Tensor | float, fmt: Format) -> Tensor:
    """float8 tensor of x's shape: sat(x.float() * scale), nearest even; NaN stays NaN."""
    return quantize_with_amax(x, scale, fmt, measure=False)[0]


def quantize_with_amax(x: Tensor, scale: Tensor | float, fmt: Format, *, measure: bool = True) -> tuple[Tensor, Tensor]:
    """The quantized values and the amax of x (0-d fp32, inf when x holds inf or NaN), in one pass over x."""
    x = readable(x.detach())
    scale = _scalar(scale)
    quantized = torch.empty(x.shape, dtype=_float8(fmt), device="cpu")
    top = torch.zeros((), dtype=torch.float32, device="cpu")
    job = jobs.QuantizeJob(
        x.data_ptr(), quantized.data_ptr(), scale.data_ptr(), top.data_ptr() if measure else None,
        x.numel(), jobs.DTYPES[x.dtype], jobs.format_number(fmt),
    )  # fmt: skip
    run(jobs.QUANTIZE, job, blocks_of(x.numel()))
    return quantized, top


def amax(x: Tensor) -> Tensor:
    """0-d fp32; NaN and inf come back as inf; 0 for an empty tensor."""
    x = readable(x.detach())
    top = torch.zeros((), dtype=torch.float32, device="cpu")
    job = jobs.QuantizeJob(x.data_ptr(), None, None, top.data_ptr(), x.numel(), jobs.DTYPES[x.dtype], 0)
    run(jobs.QUANTIZE, job, blocks_of(x.numel()))
    return top


def dequantize(quantized: Tensor, scale_inv: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
    """quantized.float() * scale_inv, rounded to dtype; quantized values is a float8 tensor of any shape."""
    quantized = quantized.contiguous()
    out = torch.empty(quantized.shape, dtype=dtype if dtype in jobs.DTYPES else torch.float32, device="cpu")
    decode_into(quantized, _scalar(scale_inv), format_name(quantized), out, per_block=False)
    return out.to(dtype)


def decode_into(quantized: Tensor, scale_inv: Tensor, fmt: str, out: Tensor, *, per_block: bool) -> None:
    job = jobs.DequantizeJob(
        quantized.data_ptr(), scale_inv.data_ptr(), out.data_ptr(), quantized.numel(), jobs.DTYPES[out.dtype],
        jobs.FORMATS[fmt], per_block, out.numel() * out.element_size() > STREAMING_BYTES,
    )  # fmt: skip
    run(jobs.DEQUANTIZE, job, blocks_of(quantized.numel()))


def _tile_job(x: Tensor, quantized: Tensor, scale_inv: Tensor, fmt: str, tile_rows: int, power_of_two: bool) -> tuple:
    """The job for [rows, columns] views, its units (rows of tiles), and how many of them are worth a thread."""
    columns = quantized.shape[-1]
    rows = quantized.numel() // columns if columns else 0
    job = jobs.TileJob(
        x.data_ptr(), quantized.data_ptr(), scale_inv.data_ptr(), rows, columns, tile_rows,
        jobs.DTYPES[x.dtype], jobs.FORMATS[fmt], power_of_two, 0,
    )  # fmt: skip
    return job, -(-rows // tile_rows), max(1, GRAIN_BLOCKS * BLOCK_SIZE // (tile_rows * max(columns, 1)))


def _quantize_tiles(x: Tensor, fmt: Format, tile_rows: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    x = readable(x.detach())
    quantized = torch.empty(x.shape, dtype=_float8(fmt), device="cpu")
    tiles = (*x.shape[:-2], -(-x.shape[-2] // tile_rows)) if tile_rows > 1 else x.shape[:-1]
    scale_inv = torch.empty(*tiles, blocks_of(x.shape[-1]), dtype=torch.float32, device="cpu")
    run(jobs.TILE_QUANTIZE, *_tile_job(x, quantized, scale_inv, fmt.name, tile_rows, power_of_two))
    return quantized, scale_inv


def _dequantize_tiles(quantized: Tensor, scale_inv: Tensor, dtype: torch.dtype, tile_rows: int) -> Tensor:
    quantized, scale_inv = quantized.contiguous(), scale_inv.contiguous()
    out = torch.empty(quantized.shape, dtype=dtype if dtype in jobs.DTYPES else torch.float32, device="cpu")
    run(jobs.TILE_DEQUANTIZE, *_tile_job(out, quantized, scale_inv, format_name(quantized), tile_rows, False))
    return out.to(dtype)


def quantize_1x128(x: Tensor, fmt: Format, power_of_two: bool = True) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (float8 [..., K], scale_inv [..., ceil(K / 128)]): activations and gradients."""
    return _quantize_tiles(x, fmt, 1, power_of_two)


def quantize_128x128(x: Tensor, fmt: Format, power_of_two: bool = True) -> tuple[Tensor, Tensor]:
    """x [N, K] -> (float8 [N, K], scale_inv [ceil(N / 128), ceil(K / 128)]): weights."""
    return _quantize_tiles(x, fmt, BLOCK_SIZE, power_of_two)


def dequantize_1x128(quantized: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The way back of `quantize_1x128`, rounded to fp32 and then to `dtype`."""
    return _dequantize_tiles(quantized, scale_inv, dtype, 1)


def dequantize_128x128(quantized: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The way back of `quantize_128x128`, rounded to fp32 and then to `dtype`."""
    return _dequantize_tiles(quantized, scale_inv, dtype, BLOCK_SIZE)
