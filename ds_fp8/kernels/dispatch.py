"""One name for each operation, whatever the device: C++ on the CPU, Triton on a GPU, PyTorch where neither can.

The names and arguments are those of `ds_fp8.numerics`, which is also what runs when a fast path is missing. A fast path
is what `kernels.cpu.library()` or `kernels.triton.library()` gives: None when it cannot run here (after one warning),
or an object with a string `path` and (some of) these functions, which compute the same bits as numerics:

    quantize(x, scale, fmt)   dequantize(quantized, scale_inv, dtype)   amax(x)
    amax_many(tensors)   quantize_many(tensors, scales, fmt, quantized)
    quantize_with_amax(x, scale, fmt)   dequantize_1x128(quantized, scale_inv, dtype)   dequantize_128x128(...)
    quantize_1x128(x, fmt, power_of_two)   quantize_128x128(x, fmt, power_of_two)
    flat_encode(x, fmt, rounding, best_of_two, out)   flat_decode(quantized, scale_inv, fmt, out, dtype)
    flat_sum(quantized, scale_inv, fmt, factor, out, own)
    flat_sum_encode(quantized, scale_inv, fmt, factor, out_fmt, own, best_of_two, out)
    adam_step(step)   lion_step(step)

A function that it lacks, or that returns NotImplemented for these dtypes or strides, is done by PyTorch: same bits.
Arguments are passed by position, with no default left out. On the CPU tensors must be contiguous (rows of `quantized`
and `scale_inv` in the sums may be strided); otherwise PyTorch takes them. An Adam step with `torch_sqrt` on a CPU whose
torch has a square root of its own goes to PyTorch, unless the fast path says `has_torch_sqrt`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from .. import numerics
from ..formats import Format
from ..levels import MASTERS, OWN, STATES, MasterFormat, StateFormat
from ..numerics import flat
from ..numerics.adam import torch_sqrt_is_ieee
from ..numerics.random_bits import Stochastic
from .adam import AdamStep, reference_step
from .lion import LionStep, reference_lion_step

LOGGER = logging.getLogger("ds_fp8")
_PACKAGES = {"cpu": ".cpu", "cuda": ".triton"}
_libraries: dict[str, Any | None] = {}


def library_for(device: torch.device | str) -> Any | None:
    """The fast path of a device, looked for once; None where PyTorch does the work."""
    kind = torch.device(device).type
    if kind not in _libraries:
        package = _PACKAGES.get(kind)
        _libraries[kind] = None if package is None else import_module(package, __package__).library()
    return _libraries[kind]


def path(device: torch.device | str = "cpu") -> str:
    """What runs on `device`: `avx512`, `avx2`, `portable`, `triton` or `torch`."""
    library = library_for(device)
    return "torch" if library is None else library.path


def _fast(name: str, tensor: torch.Tensor, *arguments: Any) -> Any:
    """The fast path's answer, or NotImplemented. `tensor` decides the device and must be contiguous."""
    if not tensor.is_contiguous():
        return NotImplemented
    return _call(name, tensor.device, *arguments)


def _call(name: str, device: torch.device, *arguments: Any) -> Any:
    function = getattr(library_for(device), name, None)
    return NotImplemented if function is None else function(*arguments)


def quantize(x: torch.Tensor, scale: torch.Tensor | float, fmt: Format) -> torch.Tensor:
    """See numerics.cast.quantize: quantized values of `x` under one scale."""
    result = _fast("quantize", x, x, scale, fmt)
    return numerics.quantize(x, scale, fmt) if result is NotImplemented else result


def dequantize(
    quantized: torch.Tensor, scale_inv: torch.Tensor | float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """See numerics.cast.dequantize: float8 values times one scale_inv."""
    result = _fast("dequantize", quantized, quantized, scale_inv, dtype)
    return numerics.dequantize(quantized, scale_inv, dtype) if result is NotImplemented else result


def amax(x: torch.Tensor) -> torch.Tensor:
    """See numerics.cast.amax: largest |x|, infinity for anything not finite."""
    result = _fast("amax", x, x)
    return numerics.amax(x) if result is NotImplemented else result


def quantize_with_amax(x: torch.Tensor, scale: torch.Tensor | float, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize` and `amax` of the same tensor, in one pass where a fast path can."""
    result = _fast("quantize_with_amax", x, x, scale, fmt)
    return (quantize(x, scale, fmt), amax(x)) if result is NotImplemented else result


def amax_many(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`amax` of each of some tensors on one device, fp32 [tensors]; one launch on a GPU."""
    result = _call("amax_many", tensors[0].device, tensors)
    return torch.stack([amax(one) for one in tensors]) if result is NotImplemented else result


def quantize_many(
    tensors: Sequence[torch.Tensor], scales: torch.Tensor, fmt: Format, quantized: Sequence[torch.Tensor]
) -> None:
    """`quantize` of each under its own scale (fp32 [tensors]) into `quantized` (uint8, contiguous); one launch on a
    GPU.
    """
    if _call("quantize_many", tensors[0].device, tensors, scales, fmt, quantized) is NotImplemented:
        for one, scale, out in zip(tensors, scales, quantized, strict=True):
            out.copy_(quantize(one, scale, fmt).view(torch.uint8))


def dense(quantized: torch.Tensor) -> torch.Tensor:
    """FP8 values [R, C], or [experts, R, C], dense by rows: themselves, or a copy of transposed views, which is what
    dgrad and wgrad want.
    """
    if quantized.is_contiguous():
        return quantized
    result = _call("dense", quantized.device, quantized)
    return quantized.contiguous() if result is NotImplemented else result


def quantize_1x128(x: torch.Tensor, fmt: Format, *, power_of_two: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """See numerics.gemm_blocks: a scale for each 1x128 group."""
    result = _fast("quantize_1x128", x, x, fmt, power_of_two)
    return numerics.quantize_1x128(x, fmt, power_of_two=power_of_two) if result is NotImplemented else result


def quantize_128x128(x: torch.Tensor, fmt: Format, *, power_of_two: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """See numerics.gemm_blocks: a scale for each 128x128 tile."""
    result = _fast("quantize_128x128", x, x, fmt, power_of_two)
    return numerics.quantize_128x128(x, fmt, power_of_two=power_of_two) if result is NotImplemented else result


def dequantize_1x128(
    quantized: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """See numerics.gemm_blocks: the way back of quantize_1x128."""
    result = _fast("dequantize_1x128", quantized, quantized, scale_inv, dtype)
    return numerics.dequantize_1x128(quantized, scale_inv, dtype) if result is NotImplemented else result


def dequantize_128x128(
    quantized: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """See numerics.gemm_blocks: the way back of quantize_128x128."""
    result = _fast("dequantize_128x128", quantized, quantized, scale_inv, dtype)
    return numerics.dequantize_128x128(quantized, scale_inv, dtype) if result is NotImplemented else result


def flat_encode(
    x: torch.Tensor,
    fmt: Format,
    *,
    rounding: Stochastic | None = None,
    best_of_two: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See numerics.flat.encode: quantized (uint8 [n]) and scale_inv (fp32 [blocks])."""
    if _rows_contiguous(*(out or ())):
        result = _fast("flat_encode", x, x, fmt, rounding, best_of_two, out)
        if result is not NotImplemented:
            return result
    return flat.encode(x, fmt, rounding=rounding, best_of_two=best_of_two, out=out)


def flat_decode(
    quantized: torch.Tensor,
    scale_inv: torch.Tensor,
    fmt: Format,
    *,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """See numerics.flat.decode."""
    if out is None or out.is_contiguous():
        result = _fast("flat_decode", quantized, quantized, scale_inv, fmt, out, dtype)
        if result is not NotImplemented:
            return result
    return flat.decode(quantized, scale_inv, fmt, out=out, dtype=dtype)


def flat_sum(
    quantized: torch.Tensor,
    scale_inv: torch.Tensor,
    fmt: Format,
    *,
    factor: float = 1.0,
    out: torch.Tensor | None = None,
    own: torch.Tensor | None = None,
) -> torch.Tensor:
    """See numerics.flat.sum_contributions: fp32 sum over ranks in rank order, times `factor`."""
    if _rows_contiguous(quantized, scale_inv) and all(t is None or t.is_contiguous() for t in (out, own)):
        result = _call("flat_sum", quantized.device, quantized, scale_inv, fmt, factor, out, own)
        if result is not NotImplemented:
            return result
    return flat.sum_contributions(quantized, scale_inv, fmt, factor=factor, out=out, own=own)


def flat_sum_encode(
    quantized: torch.Tensor,
    scale_inv: torch.Tensor,
    fmt: Format,
    *,
    factor: float = 1.0,
    out_fmt: Format | None = None,
    own: torch.Tensor | None = None,
    best_of_two: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See numerics.flat.sum_and_encode: the sum, requantized."""
    if _rows_contiguous(quantized, scale_inv, *(out or ())) and (own is None or own.is_contiguous()):
        result = _call(
            "flat_sum_encode",
            quantized.device,
            quantized,
            scale_inv,
            fmt,
            factor,
            out_fmt or fmt,
            own,
            best_of_two,
            out,
        )
        if result is not NotImplemented:
            return result
    return flat.sum_and_encode(
        quantized, scale_inv, fmt, factor=factor, out_fmt=out_fmt, own=own, best_of_two=best_of_two, out=out
    )


def adam_step(step: AdamStep) -> None:
    """One pass of Adam over a flat partition; see kernels.adam."""
    if step.param.numel() == 0:
        return
    if not _has_kernels(step) or not _is_fast(step) or _call("adam_step", step.param.device, step) is NotImplemented:
        reference_step(step)


def lion_step(step: LionStep) -> None:
    """One pass of Lion over a flat partition; see kernels.lion."""
    if step.param.numel() and _call("lion_step", step.param.device, step) is NotImplemented:
        _say_once(f"Lion's step has no kernel on {step.param.device.type} yet: PyTorch does it, to the same numbers")
        reference_lion_step(step)


def _has_kernels(step: AdamStep) -> bool:
    """Whether the device's fast path knows the formats of states and master; said once where it does not."""
    device = step.param.device.type
    known = "cpp" if device == "cpu" else "triton"
    missing = [f"states in {s}" for s in (step.exp_avg.format, step.exp_avg_sq.format) if not _knows(STATES[s], known)]
    if step.master.format != OWN and not _knows(MASTERS[step.master.format], known):
        missing.append(f"masters in {step.master.format}")
    for what in missing:
        _say_once(f"{what} have no kernel on {device}: PyTorch does the step, to the same numbers")
    return not missing


def _knows(fmt: StateFormat | MasterFormat, kernels: str) -> bool:
    return getattr(fmt, kernels) is not None


@functools.cache
def _say_once(text: str) -> None:
    LOGGER.warning("ds_fp8: %s", text)


def _is_fast(step: AdamStep) -> bool:
    """Whether a fast path may take the step."""
    if not all(tensor.is_contiguous() for tensor in step.tensors()):
        return False
    if step.param.device.type != "cpu" or not step.torch_sqrt or torch_sqrt_is_ieee():
        return True
    return getattr(library_for("cpu"), "has_torch_sqrt", False)


def _rows_contiguous(*tensors: torch.Tensor) -> bool:
    """Whether the last axis of each is dense; rows may lie apart."""
    return all(tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 for tensor in tensors)
