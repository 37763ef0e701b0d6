"""`block`: a current scale for each 1x128 group of an input or grad_output, and each 128x128 tile of a weight.

1x128 groups lie along the axis that the product sums over, so an operand that is used both ways (input in fprop and
wgrad) is cast twice, each time from high precision. Tiles transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...formats import BLOCK_SIZE, E4M3, Format
from ...kernels import quantize_1x128, quantize_128x128
from ...numerics.gemm_blocks import block_scale
from .. import grouped_blocks
from ..layer_state import Call, QuantizedWeight
from ..operands import GROUPS, TILES, Operand, Quantized, QuantizedPair, with_overflow_shown
from .base import Scaling
from .owner import Segment, measure_tiles, quantize_tiles, tiles_of

TILE_STEP = 512
"""Sides of a weight: with four tiles the rows of their scales begin at 16 bytes by themselves."""

MULTIPLIES_BLOCKS = True
"""Whether block scales go to `torch._scaled_mm`, which multiplies with them on Hopper (torch 2.11, CUDA 13)."""


class BlockScaling(Scaling):
    input_extent = GROUPS
    weight_extent = TILES
    transposes = False
    carries_weight = False
    fast_accumulation = False
    grouped = grouped_blocks
    te_class = "Float8BlockScaling"
    te_probe = "is_fp8_block_scaling_available"
    te_quantized = (
        "float8_blockwise_tensor",
        "Float8BlockwiseQTensor",
        ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv", "fp8_dtype", "quantizer",
         "is_2D_scaled"),
    )  # fmt: skip

    def quantize(self, x: torch.Tensor, call: Call, column: int) -> Operand:
        return Operand(*quantize_1x128(x, call.format_of(column)), GROUPS)

    def quantize_transposed(self, x: torch.Tensor, call: Call, column: int) -> Operand:
        return Operand(*quantize_1x128(x.t().contiguous(), call.format_of(column)), GROUPS)

    def requantize_weight(
        self, weight: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor] | None, fmt: Format
    ) -> Operand:
        return Operand(*quantize_128x128(weight.detach(), fmt), TILES)

    def fast_rows(self, weight: torch.Tensor) -> int:
        if not (MULTIPLIES_BLOCKS and torch.cuda.get_device_capability(weight.device)[0] == 9):
            return 0
        return 0 if any(size % TILE_STEP for size in weight.shape) else BLOCK_SIZE

    def quantize_on_cuda(
        self,
        library: Any,
        x: torch.Tensor,
        call: Call,
        column: int,
        *,
        straight: bool,
        transposed: bool,
        guarded: bool,
        kept: torch.Tensor | None = None,
    ) -> QuantizedPair:
        found = library.operands.cast_groups(x, call.format_of(column), straight=straight, transposed=transposed)
        pair = list(found)
        if guarded:
            data, scale_inv = pair[transposed]
            pair[transposed] = data, with_overflow_shown(scale_inv, library.amax(x))
        none: Quantized = (None, None)
        return pair[0] or none, pair[1] or none

    def quantize_weight_on_cuda(
        self, library: Any, weight: torch.Tensor, call: Call, *, straight: bool, transposed: bool,
        kept: torch.Tensor | None = None,
    ) -> Operand:  # fmt: skip
        tiles, back = library.operands.cast_tiles(weight, call.recipe.forward_format, transposed=transposed)
        turned = None if back is None else Operand(back[0], back[1], TILES)
        return Operand(tiles[0], tiles[1], TILES, transposed=turned)

    def carried_scale_shape(self, k: Any, rows: Any) -> tuple[Any, ...]:
        return (k, (rows + BLOCK_SIZE - 1) // BLOCK_SIZE)

    def owner_amaxes(self, shape: tuple[int, int]) -> int:
        rows, columns = tiles_of(shape)
        return rows * columns

    def owner_measure(self, segments: Sequence[Segment], owners: Sequence[int], amaxes: torch.Tensor,
                      per_weight: Sequence[torch.Tensor]) -> None:  # fmt: skip
        for segment, owner in zip(segments, owners, strict=True):
            measure_tiles(segment, per_weight[owner].view(tiles_of(segment.weight.shape)))

    def owner_scales(
        self, weights: Sequence[Any], amaxes: Sequence[torch.Tensor], fp8_state: Any
    ) -> list[torch.Tensor]:
        return [self.frozen_scales(one, weight.shape, E4M3) for weight, one in zip(weights, amaxes, strict=True)]

    def owner_expert_scales(self, shape: tuple[int, int], amaxes: torch.Tensor) -> torch.Tensor:
        return block_scale(amaxes.view(-1, *tiles_of(shape)), E4M3, power_of_two=True)

    def owner_quantize(self, segments: Sequence[Segment], scales: Sequence[torch.Tensor]) -> None:
        for segment, of_segment in zip(segments, scales, strict=True):
            quantize_tiles(segment, of_segment)

    def frozen_scales(self, amaxes: torch.Tensor, shape: tuple[int, int], fmt: Format) -> torch.Tensor:
        return block_scale(amaxes.view(tiles_of(shape)), fmt, power_of_two=True)

    def quantize_frozen(self, weight: torch.Tensor, fmt: Format) -> QuantizedWeight:
        return QuantizedWeight(*quantize_128x128(weight, fmt))

    def te_quantized_arguments(self, data: torch.Tensor, scale_inv: torch.Tensor, quantizer: Any) -> dict[str, Any]:
        rows, columns = scale_inv.shape
        padded = torch.zeros(quantizer.get_scale_shape(data.shape, False), dtype=torch.float32, device=data.device)
        padded[:rows, :columns] = scale_inv
        return {
            "rowwise_data": data,
            "rowwise_scale_inv": padded,
            "columnwise_data": None,
            "columnwise_scale_inv": None,
            "is_2D_scaled": True,
        }


SCALING = BlockScaling()
