"""Products of stacked experts under recipe `block`: for each expert the three products of a linear layer.

1x128 groups along the axis that is summed, 128x128 tiles of each expert's weight. So in wgrad, which sums over tokens,
a group holds up to 128 tokens of one expert and never those of two. The formats are the recipe's.
"""

from __future__ import annotations

import torch

from ..formats import Format
from ..kernels import quantize_1x128, quantize_128x128
from .gemm import matmul
from .groups import Groups, Stack
from .operands import GROUPS, TILES, Operand


def fprop(x: torch.Tensor, weight: Stack, groups: Groups, dtype: torch.dtype, fmt: Format) -> torch.Tensor:
    """x [S, K] with weight [E, N, K] -> [S, N]."""
    tiles = _operands(weight, fmt)
    out = x.new_zeros((groups.rows, weight.shape[1]), dtype=dtype)
    for expert, (first, last) in enumerate(groups.bounds):
        if last > first:
            out[first:last] = matmul(_rows(x[first:last], fmt), tiles[expert], dtype)
    return out


def dgrad(
    grad_output: torch.Tensor, weight: Stack, groups: Groups, dtype: torch.dtype, fmt: Format, backward: Format
) -> torch.Tensor:
    """grad_output [S, N] with weight [E, N, K] -> [S, K]."""
    tiles = _operands(weight, fmt)
    out = grad_output.new_zeros((groups.rows, weight.shape[2]), dtype=dtype)
    for expert, (first, last) in enumerate(groups.bounds):
        if last > first:
            left = _rows(grad_output[first:last], backward)
            out[first:last] = matmul(left, tiles[expert].t(), dtype)
    return out


def keep_for_wgrad(x: torch.Tensor, groups: Groups, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantized values [K, S] and scale_inv [K, sum of ceil(rows / 128)], expert after expert."""
    made = [quantize_1x128(x[first:last].t().contiguous(), fmt) for first, last in groups.bounds if last > first]
    if not made:
        return x.new_zeros((x.shape[1], 0)), x.new_zeros((x.shape[1], 0))
    quantized, scales = zip(*made, strict=True)
    return torch.cat([c.view(torch.uint8) for c in quantized], 1).view(quantized[0].dtype), torch.cat(scales, 1)


def wgrad(
    grad_output: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor],
    groups: Groups,
    dtype: torch.dtype,
    backward: Format,
    transposed: bool = False,
) -> torch.Tensor:
    """grad_output [S, N] with the kept input -> [E, N, K], or [E, K, N]; zeros for experts without rows."""
    quantized, scales = kept
    out = grad_output.new_zeros((groups.experts, grad_output.shape[1], quantized.shape[0]), dtype=dtype)
    place = 0
    for expert, (first, last) in enumerate(groups.bounds):
        if last > first:
            width = scales[:, place : place + -(-(last - first) // 128)].contiguous()
            place += width.shape[1]
            right = Operand(quantized[:, first:last].contiguous(), width, GROUPS)
            out[expert] = matmul(_rows(grad_output[first:last].t().contiguous(), backward), right, dtype)
    return out.transpose(1, 2).contiguous() if transposed else out


def _rows(x: torch.Tensor, fmt: Format) -> Operand:
    quantized, scale_inv = quantize_1x128(x.contiguous(), fmt)
    finite = torch.isfinite(x.detach().abs().amax())
    return Operand(quantized, torch.where(finite, scale_inv, torch.full_like(scale_inv, torch.nan)), GROUPS)


def _operands(weight: Stack, fmt: Format) -> list[Operand]:
    """The weights [N, K] of all experts."""
    if weight.given is None:
        return weight.once("tiles", lambda stack: [_tiles(one, fmt) for one in stack.straight])
    every = [Operand(data, scale_inv, TILES) for data, scale_inv in zip(*weight.given, strict=True)]
    return [one.t() for one in every] if weight.transposed else every


def _tiles(weight: torch.Tensor, fmt: Format) -> Operand:
    return Operand(*quantize_128x128(weight.contiguous(), fmt), TILES)
