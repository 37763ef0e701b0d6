"""One operand of a product: FP8 codes with their scales, made by the recipe that is in force.

    delayed   one scale, known beforehand from the book; the amax is recorded for later. A tensor without history
              is cast as under `current`, once: so its first non-zero amax is used at once
    current   one scale from this tensor's own amax
    block     1x128 groups along the summed axis for input and grad_output, 128x128 tiles for the weight

With one scale per tensor, codes serve both orientations. 1x128 groups lie along the axis that the product sums over,
so an operand that is used both ways (input in fprop and wgrad) is cast twice, each time from high precision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..formats import BLOCK_SIZE, Format
from ..kernels import amax as amax_of
from ..kernels import dequantize, quantize, quantize_1x128, quantize_128x128, quantize_with_amax
from ..numerics.gemm_blocks import dequantize_1x128, dequantize_128x128
from ..numerics.scaling import scale_from_amax, scale_inv_of

if TYPE_CHECKING:
    from .page import Call

TENSOR, GROUPS, TILES = "tensor", "1x128", "128x128"
"""Extent of one scale."""


@dataclass(frozen=True, eq=False)
class Operand:
    """`data` [rows, columns] float8; what it stands for is data * scale_inv.

    scale_inv  0-d fp32 (TENSOR), [rows, columns / 128] (GROUPS) or [rows / 128, columns / 128] (TILES), rounded up
    scale      what was multiplied on the way in, where it was known beforehand (delayed)
    amax       0-d fp32, where it was measured
    turned     the transposed operand, dense in memory, where both were made at once (on a GPU)
    values     the bare codes decoded already, where an emulated operand serves two products; see `decoded`
    """

    data: torch.Tensor
    scale_inv: torch.Tensor
    extent: str = TENSOR
    scale: torch.Tensor | None = None
    amax: torch.Tensor | None = None
    turned: Operand | None = None
    values: torch.Tensor | None = None

    def t(self) -> Operand:
        """The transposed operand, as views. 1x128 groups do not transpose: such an operand is cast again."""
        assert self.extent != GROUPS, "1x128 groups lie along one axis"
        scale_inv = self.scale_inv.t() if self.extent == TILES else self.scale_inv
        values = None if self.values is None else self.values.t()
        return replace(self, data=self.data.t(), scale_inv=scale_inv, values=values)

    def decoded(self, dtype: torch.dtype) -> Operand:
        """The same operand, which carries its codes in `dtype`, so that two products decode them once (TENSOR only)."""
        return replace(self, values=self.decode(dtype))

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The bare codes in `dtype` for TENSOR (exact in bf16 and fp32), else codes times their block's scale_inv."""
        if self.values is not None and self.values.dtype == dtype:
            return self.values
        if self.extent == TENSOR:
            return self._inflate(1.0, dtype)
        if not self.data.is_contiguous() and self.extent == TILES:
            return self.t().decode(dtype).t()
        return self._inflate_blocks(dtype)

    def _inflate_blocks(self, dtype: torch.dtype) -> torch.Tensor:
        """Whole blocks: the fast decode, then one product by powers of two, exact in bf16 too. Short edges: numerics."""
        rows, columns = self.data.shape
        whole = columns % BLOCK_SIZE == 0 and (self.extent == GROUPS or rows % BLOCK_SIZE == 0)
        if not whole or not self.data.is_contiguous() or dtype == torch.float16:
            inflate = dequantize_1x128 if self.extent == GROUPS else dequantize_128x128
            return inflate(self.data, self.scale_inv, dtype)
        values = dequantize(self.data, 1.0, dtype)
        scale_inv = self.scale_inv.to(dtype)
        if self.extent == GROUPS:
            values.view(rows, -1, BLOCK_SIZE).mul_(scale_inv.unsqueeze(-1))
        else:
            values.view(-1, BLOCK_SIZE, columns // BLOCK_SIZE, BLOCK_SIZE).mul_(scale_inv[:, None, :, None])
        return values

    def _inflate(self, factor: torch.Tensor | float, dtype: torch.dtype) -> torch.Tensor:
        """Transposed views are decoded as they lie in memory, and transposed again: fast paths want dense codes."""
        if self.data.is_contiguous():
            return dequantize(self.data, factor, dtype)
        return dequantize(self.data.t().contiguous(), factor, dtype).t()


class CachedWeight(NamedTuple):
    """Codes of a weight, and what they are codes of.

    weight   the Parameter itself: a tensor that another one replaces may lie at the same address
    version  how often it had been written, and `address` where its data lay: `weight.data = other` keeps the Parameter
    operand  None where somebody else keeps the codes (Transformer Engine)
    """

    weight: torch.Tensor
    version: int
    address: int
    operand: Operand | None

    def is_of(self, weight: torch.Tensor) -> bool:
        return self.weight is weight and self.version == weight._version and self.address == weight.data_ptr()


def cast(x: torch.Tensor, call: Call, column: int) -> Operand:
    """Cast an input or grad_output `x` [rows, columns] for a product that sums over its columns.

    Under delayed scaling the amax is recorded if it counts; `cast_transposed` then must not do so again.
    """
    fmt = call.format_of(column)
    kind = call.recipe.kind
    if kind == "block":
        return Operand(*quantize_1x128(x, fmt), GROUPS)
    if kind == "current":
        return _cast_current(x, fmt)
    return _cast_delayed(x, call, column, fmt)


def cast_transposed(x: torch.Tensor, codes: Operand | None, call: Call, column: int) -> Operand:
    """The operand for a product that sums over the rows of `x`: `codes` transposed, or a cast of its own."""
    if codes is not None and codes.extent == TENSOR:
        return codes.t()
    if call.recipe.kind == "block":
        return Operand(*quantize_1x128(x.t().contiguous(), call.format_of(column)), GROUPS)
    return cast(x, call, column).t()


def cast_weight(weight: torch.Tensor, call: Call) -> Operand:
    """The weight [N, K] as codes: set from outside (O3), cached in this optimizer step, or cast now.

    Cast as often as the layer runs, since a weight can change in ways that leave no trace (`weight.data.copy_(...)`): within
    a step the scale stands still, so an unchanged weight gives the same codes, and its amax counts once.
    """
    page = call.page
    if call.weight_codes is not None:
        if call.records and page.staged_weight_amax is not None:
            call.record(page.weight_column, page.staged_weight_amax)
            page.staged_weight_amax = None
        return Operand(*call.weight_codes, TILES if call.recipe.kind == "block" else TENSOR)
    if not call.may_cache(weight):
        return _cast_weight_now(weight, call)
    if page.cached is None or not page.cached.is_of(weight):
        operand = _cast_weight_now(weight, call)
        page.cached = CachedWeight(weight, weight._version, weight.data_ptr(), operand)
    return page.cached.operand


def scale_of(operand: Operand) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(scale, scale_inv) with which the same codes can be made again; None where they follow from the tensor itself."""
    return None if operand.scale is None else (operand.scale, operand.scale_inv)


def recast_weight(weight: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor] | None, call: Call) -> Operand:
    """The codes of an earlier cast, made again from a weight that was gathered anew; see `scale_of`."""
    weight, fmt = weight.detach(), call.recipe.forward_format
    if scale is not None:
        return Operand(quantize(weight, scale[0], fmt), scale[1], TENSOR, scale[0])
    if call.recipe.kind == "block":
        return Operand(*quantize_128x128(weight, fmt), TILES)
    return _cast_current(weight, fmt)


def is_sharded(weight: torch.Tensor) -> bool:
    """Under ZeRO-3 a weight exists only while its layer runs."""
    return hasattr(weight, "ds_id")


def measure(x: torch.Tensor, operand: Operand | None) -> torch.Tensor:
    """The amax of `x`, taken from its operand where that measured it already."""
    return amax_of(x) if operand is None or operand.amax is None else operand.amax


def _cast_weight_now(weight: torch.Tensor, call: Call) -> Operand:
    if not call.recipe.is_delayed:
        return recast_weight(weight, None, call)
    fmt, column = call.recipe.forward_format, call.page.weight_column
    if is_given(weight) and not call.page.book.exact:
        return _cast_without_history(weight.detach(), call, column, fmt, amax_of(weight.detach()))
    return _cast_delayed(weight.detach(), call, column, fmt)


def is_given(weight: torch.Tensor) -> bool:
    """No Parameter, nor a view of one: what `torch.func.functional_call` puts in its place has another range, for one call."""
    return not isinstance(weight if weight._base is None else weight._base, torch.nn.Parameter)


def _cast_current(x: torch.Tensor, fmt: Format) -> Operand:
    amax = amax_of(x)
    scale = scale_from_amax(amax, fmt)
    return Operand(quantize(x, scale, fmt), scale_inv_of(scale), amax=amax)


def _cast_delayed(x: torch.Tensor, call: Call, column: int, fmt: Format) -> Operand:
    """With the scale of this step; the amax is recorded if it counts."""
    if not call.knows(column):
        amax = amax_of(x)
        if call.records:
            call.record(column, amax)
        return _cast_without_history(x, call, column, fmt, amax)
    scale, scale_inv = call.scale(column)
    if not call.records:
        return Operand(quantize(x, scale, fmt), scale_inv, TENSOR, scale)
    codes, amax = quantize_with_amax(x, scale, fmt)
    call.record(column, amax)
    return Operand(codes, scale_inv, TENSOR, scale, amax)


def _cast_without_history(x: torch.Tensor, call: Call, column: int, fmt: Format, amax: torch.Tensor) -> Operand:
    scale = call.scales.of_tensor(column, amax, fmt, given=call.knows(column))
    return Operand(quantize(x, scale, fmt), scale_inv_of(scale), TENSOR, scale, amax)
