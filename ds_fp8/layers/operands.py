"""One operand of a product: FP8 data with its scales; the recipe that is in force makes them (`recipes`).

With one scale per tensor, quantized values serve both orientations. Scales that lie along the axis which the product
sums over do not: an operand that is used both ways (input in fprop and wgrad) is cast twice then, each time from high
precision.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..formats import BLOCK_SIZE
from ..kernels import amax as amax_of
from ..kernels import dequantize
from ..numerics.gemm_blocks import dequantize_1x128, dequantize_128x128

if TYPE_CHECKING:
    from .layer_state import Call, LayerFp8State, QuantizedWeight

TENSOR, ROWS, GROUPS, TILES = "tensor", "row", "1x128", "128x128"
"""Extent of one scale."""


@dataclass(frozen=True, eq=False)
class Operand:
    """`data` [rows, columns] float8; what it stands for is data * scale_inv.

    scale_inv   0-d fp32 (TENSOR), [rows] (ROWS), [rows, columns / 128] (GROUPS) or [rows / 128, columns / 128] (TILES),
                rounded up
    scale       what was multiplied on the way in, where it was known beforehand (delayed)
    amax        0-d fp32, where it was measured
    transposed  the transposed operand, dense in memory, where both were made at once (on a GPU)
    values      the bare quantized values decoded already, where an emulated operand serves two products; see `decoded`
    """

    data: torch.Tensor
    scale_inv: torch.Tensor
    extent: str = TENSOR
    scale: torch.Tensor | None = None
    amax: torch.Tensor | None = None
    transposed: Operand | None = None
    values: torch.Tensor | None = None

    def t(self) -> Operand:
        """The transposed operand, as views. Rows and 1x128 groups do not transpose: such an operand is cast again."""
        assert self.extent in (TENSOR, TILES), "these scales lie along one axis"
        scale_inv = self.scale_inv.t() if self.extent == TILES else self.scale_inv
        values = None if self.values is None else self.values.t()
        return replace(self, data=self.data.t(), scale_inv=scale_inv, values=values)

    def decoded(self, dtype: torch.dtype) -> Operand:
        """The same operand, which carries its quantized values in `dtype`, so that two products decode them once
        (TENSOR only).
        """
        return replace(self, values=self.decode(dtype))

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The bare quantized values in `dtype` for TENSOR and ROWS (exact in bf16 and fp32), else quantized values
        times their block's scale_inv.
        """
        if self.values is not None and self.values.dtype == dtype:
            return self.values
        if self.extent in (TENSOR, ROWS):
            return self._inflate(1.0, dtype)
        if not self.data.is_contiguous() and self.extent == TILES:
            return self.t().decode(dtype).t()
        return self._inflate_blocks(dtype)

    def _inflate_blocks(self, dtype: torch.dtype) -> torch.Tensor:
        """Whole blocks: the fast decode, then one product by powers of two, exact in bf16 too. Short edges:
        numerics.
        """
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
        """Transposed views are decoded as they lie in memory, and transposed again: fast paths want dense data."""
        if self.data.is_contiguous():
            return dequantize(self.data, factor, dtype)
        return dequantize(self.data.t().contiguous(), factor, dtype).t()


Quantized = tuple[torch.Tensor | None, torch.Tensor | None]
"""float8 data and scale_inv; None where nobody asked for them."""

QuantizedPair = tuple[Quantized, Quantized]
"""An operand as it lies, and transposed."""


class CachedWeight(NamedTuple):
    """A quantized weight, and what it was made of.

    weight   the Parameter itself: a tensor that another one replaces may lie at the same address
    version  how often it had been written, and `address` where its data lay: `weight.data = other` keeps the Parameter
    operand  None where somebody else keeps the quantized values (Transformer Engine)
    """

    weight: torch.Tensor
    version: int
    address: int
    operand: Operand | None

    def is_of(self, weight: torch.Tensor) -> bool:
        return self.weight is weight and self.version == weight._version and self.address == weight.data_ptr()


def cast_transposed(x: torch.Tensor, quantized: Operand | None, call: Call, column: int) -> Operand:
    """The operand for a product that sums over the rows of `x`: `quantized` transposed, or a cast of its own.

    The amax that a cast of `quantized` recorded is not recorded again.
    """
    if quantized is not None and call.scaling.transposes:
        return quantized.t()
    return call.scaling.quantize_transposed(x, call, column)


def cast_weight(weight: torch.Tensor, call: Call) -> Operand:
    """The weight [N, K] in quantized form: set from outside (O3), cached in this optimizer step, or cast now.

    Cast as often as the layer runs, since a weight can change in ways that leave no trace (`weight.data.copy_(...)`):
    within a step the scale stands still, so an unchanged weight gives the same quantized values, and its amax counts
    once.
    """
    layer_state = call.layer_state
    if call.quantized_weight is not None:
        if call.records and layer_state.staged_weight_amax is not None:
            call.record(layer_state.weight_column, layer_state.staged_weight_amax)
            layer_state.staged_weight_amax = None
        return given_weight(call.quantized_weight, call)
    if not call.may_cache(weight):
        return call.scaling.quantize_weight(weight, call)
    cached = layer_state.cached
    operand = cached.operand if cached is not None and cached.is_of(weight) else None
    if operand is None:
        operand = call.scaling.quantize_weight(weight, call)
        layer_state.cached = CachedWeight(weight, weight._version, weight.data_ptr(), operand)
    return operand


def given_weight(quantized: QuantizedWeight, call: Call) -> Operand:
    """A quantized weight that was set from outside (O3), as an operand."""
    return Operand(*quantized, call.scaling.weight_extent)


def is_sharded(weight: torch.Tensor) -> bool:
    """Under ZeRO-3 a weight exists only while its layer runs."""
    return hasattr(parameter_of(weight), "ds_id")


def comes_again(weight: torch.Tensor, call: Call) -> bool:
    """Whether the weight, or its quantized values, will be there in the backward without being kept: gathered again, or
    a store's own.
    """
    return is_sharded(weight) or call.quantized_weight is not None


def parameter_of(weight: torch.Tensor) -> torch.Tensor:
    """What a backward may keep of a weight that comes again: the Parameter, and not a view of memory that goes."""
    base = weight._base
    return base if isinstance(base, torch.nn.Parameter) and base.shape == weight.shape[::-1] else weight


def split_released(weight: torch.Tensor, quantized: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(what goes through `save_for_backward`, what the context keeps itself) of a weight for the backward.

    With `quantized` values set from outside the weight may be released (O3). Hooks on saved tensors
    (`torch.autograd.graph.save_on_cpu`) are handed bare memory, past the Parameter's own reads, and there is none.
    """
    return (weight, None) if quantized is None else (None, weight)


def weight_again(kept: torch.Tensor, call: Call) -> torch.Tensor:
    """The weight [N, K] of what `parameter_of` gave."""
    return kept.t() if call.layer_state.transposed and isinstance(kept, torch.nn.Parameter) else kept


def measure(x: torch.Tensor, operand: Operand | None) -> torch.Tensor:
    """The amax of `x`, taken from its operand where that measured it already."""
    return amax_of(x) if operand is None or operand.amax is None else operand.amax


def is_given(weight: torch.Tensor, layer_state: LayerFp8State) -> bool:
    """Not the Parameter, nor a view of it, that the layer's history is about: what `torch.func.functional_call` puts in
    its place for one call, or a script for good (`layer.weight = other.weight`), has another range.
    """
    parameter = weight if weight._base is None else weight._base
    if layer_state.history_of is None and isinstance(parameter, torch.nn.Parameter):
        layer_state.history_of = weakref.ref(parameter)
    return layer_state.history_of is None or layer_state.history_of() is not parameter


def with_overflow_shown(scale_inv: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """`scale_inv`, as NaN if `amax` is not finite; no host sync.

    A cast saturates infinities, so an overflow would vanish in the quantized values, and with it the loss scaler's
    reason to skip the step. Needed only where no product in high precision, and no gradient of a bias, shows it.
    """
    return torch.add(scale_inv, amax, alpha=0.0)
