"""The kernels under the names and arguments that `kernels.dispatch` calls; results are allocated here.

A dtype or shape that a kernel does not take gives NotImplemented, and PyTorch does that call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...formats import Format
from ...numerics.dtypes import torch_dtype
from ...numerics.flat import blocks_of
from ...numerics.messages import Layout
from ...numerics.random_bits import Stochastic
from ..adam import AdamStep
from . import (
    adam,
    blocks,
    cast,
    expert_rows,
    flat,
    gates,
    grouped,
    history,
    messages,
    operands,
    pairs,
    segments,
    visits,
    weights,
)

__all__ = ["expert_rows", "gates", "grouped", "history", "operands", "pairs", "path", "visits", "weights"]

path = "triton"

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FORMATS = ("e4m3", "e5m2")


def quantize(x: torch.Tensor, scale: torch.Tensor | float, fmt: Format) -> Any:
    """Quantized values of `x` under one scale."""
    if x.dtype not in FLOATS or fmt.name not in _FORMATS:
        return NotImplemented
    quantized = torch.empty(x.shape, dtype=torch_dtype(fmt), device=x.device)
    cast.quantize(x, _one(scale, x.device), fmt, quantized)
    return quantized


def amax(x: torch.Tensor) -> Any:
    """Largest |x|, 0-d fp32."""
    if x.dtype not in FLOATS:
        return NotImplemented
    found = torch.zeros(1, dtype=torch.float32, device=x.device)
    cast.raise_amax(x, found)
    return found[0]


def quantize_with_amax(x: torch.Tensor, scale: torch.Tensor | float, fmt: Format) -> Any:
    """Quantized values of `x` under one scale, and its amax, 0-d fp32, from one read."""
    if x.dtype not in FLOATS or fmt.name not in _FORMATS:
        return NotImplemented
    quantized = torch.empty(x.shape, dtype=torch_dtype(fmt), device=x.device)
    found = torch.zeros(1, dtype=torch.float32, device=x.device)
    cast.quantize(x, _one(scale, x.device), fmt, quantized, found)
    return quantized, found[0]


def amax_many(tensors: Sequence[torch.Tensor]) -> Any:
    """The amax of each, fp32 [tensors], in one launch."""
    return segments.amaxes(tensors) if _alike(tensors) else NotImplemented


def quantize_many(tensors: Sequence[torch.Tensor], scales: torch.Tensor, fmt: Format,
                  quantized: Sequence[torch.Tensor]) -> Any:  # fmt: skip
    """Quantized values of each under its own scale, in one launch."""
    if not _alike(tensors) or fmt.name not in _FORMATS or not scales.is_contiguous() or scales.dtype != torch.float32:
        return NotImplemented
    segments.quantize(tensors, scales, fmt, quantized)
    return None


def _alike(tensors: Sequence[torch.Tensor]) -> bool:
    """One dtype that kernels take, whole elements apart."""
    first = tensors[0]
    step = first.element_size()
    return first.dtype in FLOATS and all(
        one.dtype == first.dtype and one.is_contiguous() and (one.data_ptr() - first.data_ptr()) % step == 0
        for one in tensors
    )


def dense(quantized: torch.Tensor) -> Any:
    """A transposed view of FP8 values, dense by rows."""
    if quantized.dim() not in (2, 3) or quantized.element_size() != 1 or not quantized.mT.is_contiguous():
        return NotImplemented
    out = torch.empty(quantized.shape, dtype=quantized.dtype, device=quantized.device)
    cast.turn(quantized, out)
    return out


def quantize_1x128(x: torch.Tensor, fmt: Format, power_of_two: bool) -> Any:
    """Quantized values [..., K] and scale_inv [..., ceil(K / 128)]."""
    if x.dtype not in FLOATS or x.dim() == 0 or fmt.name not in _FORMATS:
        return NotImplemented
    quantized = torch.empty(x.shape, dtype=torch_dtype(fmt), device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    scale_inv = torch.empty(rows.shape[0], blocks_of(x.shape[-1]), dtype=torch.float32, device=x.device)
    blocks.quantize_groups(rows, fmt, (quantized.view(rows.shape), scale_inv), None, power_of_two)
    return quantized, scale_inv.view(*x.shape[:-1], -1)


def quantize_128x128(x: torch.Tensor, fmt: Format, power_of_two: bool) -> Any:
    """Quantized values [N, K] and scale_inv [ceil(N / 128), ceil(K / 128)]."""
    if x.dtype not in FLOATS or x.dim() != 2 or fmt.name not in _FORMATS:
        return NotImplemented
    quantized = torch.empty(x.shape, dtype=torch_dtype(fmt), device=x.device)
    scale_inv = torch.empty(blocks_of(x.shape[0]), blocks_of(x.shape[1]), dtype=torch.float32, device=x.device)
    blocks.quantize_tiles(x, fmt, (quantized, scale_inv), power_of_two)
    return quantized, scale_inv


def flat_encode(x: torch.Tensor, fmt: Format, rounding: Stochastic | None, best_of_two: bool,
                out: tuple[torch.Tensor, torch.Tensor] | None) -> Any:  # fmt: skip
    """Quantized values uint8 [n] and scale_inv fp32 [blocks] of a flat partition."""
    if x.dtype not in FLOATS or x.dim() != 1:
        return NotImplemented
    quantized, scale_inv = out or _new_quantized(x.numel(), x.device)
    flat.encode(x, fmt, quantized, scale_inv, rounding, best_of_two)
    return quantized, scale_inv


def _new_quantized(numel: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(numel, dtype=torch.uint8, device=device), torch.empty(
        blocks_of(numel), dtype=torch.float32, device=device
    )


def flat_decode(quantized: torch.Tensor, scale_inv: torch.Tensor, fmt: Format, out: torch.Tensor | None,
                dtype: torch.dtype) -> Any:  # fmt: skip
    """The values of a flat partition."""
    out = torch.empty(quantized.numel(), dtype=dtype, device=quantized.device) if out is None else out
    if out.dtype not in FLOATS or quantized.dtype != torch.uint8 or not scale_inv.is_contiguous():
        return NotImplemented
    flat.decode(quantized, scale_inv, fmt, out)
    return out


def flat_sum(quantized: torch.Tensor, scale_inv: torch.Tensor, fmt: Format, factor: float, out: torch.Tensor | None,
             own: torch.Tensor | None) -> Any:  # fmt: skip
    """Sum of the ranks' contributions."""
    if own is not None and own.dtype not in FLOATS:
        return NotImplemented
    out = torch.empty(quantized.shape[1], dtype=torch.float32, device=quantized.device) if out is None else out
    if out.dtype not in FLOATS or quantized.dtype != torch.uint8:
        return NotImplemented
    flat.sum_contributions(quantized, scale_inv, fmt, factor, out, own)
    return out


def flat_sum_encode(quantized: torch.Tensor, scale_inv: torch.Tensor, fmt: Format, factor: float, out_fmt: Format,
                    own: torch.Tensor | None, best_of_two: bool,
                    out: tuple[torch.Tensor, torch.Tensor] | None) -> Any:  # fmt: skip
    """The same sum, requantized."""
    if quantized.dtype != torch.uint8 or (own is not None and own.dtype not in FLOATS):
        return NotImplemented
    out = out or _new_quantized(quantized.shape[1], quantized.device)
    flat.sum_and_encode(quantized, scale_inv, fmt, factor, out_fmt, *out, own, best_of_two)
    return out


def encode_messages(tensor: torch.Tensor, layout: Layout, fmt: Format, out: torch.Tensor) -> Any:
    """The messages of a round."""
    if tensor.dtype not in FLOATS or not _searchable(layout) or not _whole_words(out):
        return NotImplemented
    messages.encode(tensor, layout, fmt, out)
    return None


def sum_messages(quantized: torch.Tensor, scale_inv: torch.Tensor, fmt: Format, own: torch.Tensor, layout: Layout,
                 factor: float, out: torch.Tensor) -> Any:  # fmt: skip
    """Sum of what arrived and the own contribution, wherever its spans lie."""
    if own.dtype not in FLOATS or out.dtype not in FLOATS or not _searchable(layout):
        return NotImplemented
    messages.sum_own(quantized, scale_inv, fmt, own, layout, factor, out)
    return None


def decode_rows(rows: torch.Tensor, fmt: Format, share: int, out: torch.Tensor) -> Any:
    """The values that every rank sent."""
    if out.dtype not in FLOATS or not _whole_words(rows):
        return NotImplemented
    messages.decode(rows, fmt, share, out)
    return None


def _searchable(layout: Layout) -> bool:
    """Whether a program can look through the table."""
    return len(layout.spans) <= messages.MOST and sum(map(len, layout.spans)) <= messages.MOST


def _whole_words(message: torch.Tensor) -> bool:
    """Whether bytes may be viewed as fp32."""
    return message.storage_offset() % 4 == 0 and message.shape[-1] % 4 == 0


def adam_step(step: AdamStep) -> Any:
    """One fused step in place."""
    if step.param.dtype not in FLOATS or step.grad.dtype not in FLOATS:
        return NotImplemented
    adam.adam_step(step)
    return None


def _one(scale: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """A scale as one fp32 element on the device; a tensor there already is taken as it is."""
    if isinstance(scale, torch.Tensor):
        return scale.to(device=device, dtype=torch.float32)
    return torch.full((1,), scale, dtype=torch.float32, device=device)
