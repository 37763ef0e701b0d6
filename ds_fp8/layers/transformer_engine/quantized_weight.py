"""O3 under Transformer Engine: quantized values that the weight's owner made, in the place where te.Linear keeps its
own.

With `is_first_microbatch=False` a layer multiplies with the quantized weight that it cached in an earlier micro-batch
and does not look at the 16-bit one. So the quantized values that travelled become such a cached weight for the length
of one call:

    delayed, current   a Float8Tensor: quantized [N, K], one scale_inv
    block              a Float8BlockwiseQTensor: quantized [N, K], scale_inv of 128x128 tiles, padded as its GEMM wants
                       them

Nothing is copied: the tensor is a view of the quantized values. Its transpose, which dgrad needs before Blackwell, is
made in the forward, because a cached weight without one counts as stale, and Transformer Engine would quantize the
16-bit weight, which may be released. It is kept from a forward to its backward, with `weight_cache` until the quantized
values change. The gradient goes to the Parameter as ever: of it, only shape and dtype are read (2.11.0 and 2.20.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import has_torch_function_unary

from ...errors import BackendError, LayerError
from ..gemm import aligned
from ..recipes import scaling_of
from .names import WORKSPACE, TransformerEngine, quantized_class
from .saved_weight import passed_by_hooks

if TYPE_CHECKING:
    from ..layer_state import QuantizedWeight
    from .linear import TELayerState


class TakesQuantizedWeight:
    """`quantized_weight` for a layer of ours: while set, and FP8 is active, the layer never reads `weight`."""

    @property
    def quantized_weight(self) -> QuantizedWeight | None:
        return self.__dict__["layer_state"].quantized_weight

    @quantized_weight.setter
    def quantized_weight(self, quantized: QuantizedWeight | None) -> None:
        layer_state = self.__dict__["layer_state"]
        layer_state.quantized_weight = quantized
        layer_state.quantized_weight_of = None if quantized is None else self._parameters.get("weight")  # type: ignore[attr-defined]
        layer_state.forget_weight()
        # What the layer cached itself is stale too, and would hold two bytes per parameter.
        self.__dict__[WORKSPACE].pop("weight", None)

    def verify_quantized(self) -> None:
        """Raises BackendError when this Transformer Engine does not keep weights as we know it."""
        quantized_class(self.__dict__["layer_state"].fp8_state.recipe.kind)
        if not isinstance(self.__dict__.get(WORKSPACE), dict):
            raise BackendError(
                f"msamp/weight_wire e4m3: this Transformer Engine's layers have no {WORKSPACE}, where FP8 weights go.\n"
                "  Set msamp/weight_wire to none, or fp8/backend to torch."
            )


@contextmanager
def weight_of(layer: Any, engine: TransformerEngine, state: TELayerState) -> Iterator[bool | None]:
    """Yields `is_first_microbatch` for one call, with the quantized values in the layer's cache if there are any.

    Call inside autocast, after `state.begin()`. Raises BackendError when the layer quantized its weight all the same.
    """
    quantized = state.quantized()
    if quantized is None or layer.weight is not layer.__dict__["layer_state"].quantized_weight_of:
        if has_torch_function_unary(layer.weight):
            raise LayerError(
                f"{layer.__dict__['layer_state'].fqn}: its weight is another layer's, of which O3 keeps FP8 data "
                "alone; Transformer Engine cannot read that.\n  Tie weights before initialize, or set fp8/backend to "
                "torch."
            )
        fresh = state.microbatch()
        if fresh:
            rebind_cached(layer, state)
        yield fresh
        return
    # Now, because a layer that meets a new recipe empties its cache.
    layer.init_fp8_metadata(num_gemms=1)
    te_tensor = state.kept_quantized
    if te_tensor is None:
        te_tensor = wrap(quantized, layer.quantizers["scaling_fwd"][1], layer.weight.dtype, state.kind)
        state.kept_quantized = te_tensor
    te_tensor.update_usage(rowwise_usage=True, columnwise_usage=True)
    cache = layer.__dict__[WORKSPACE]
    cache["weight"] = te_tensor
    try:
        # A released weight is only handed on by Transformer Engine: as it is, not as it reads.
        with torch._C.DisableTorchFunctionSubclass(), passed_by_hooks(layer.weight):
            yield False
        if cache.get("weight") is not te_tensor:
            raise BackendError(
                f"Transformer Engine {engine.version} did not take the quantized weight and quantized it again.\n"
                "  Set msamp/weight_wire to none, or fp8/backend to torch."
            )
    finally:
        cache.pop("weight", None)  # never left to a call that would quantize into it


def rebind_cached(layer: Any, state: TELayerState) -> None:
    """Point the quantizer of a cached weight at the slots of this call.

    A cached weight is cast again by the copy of the quantizer that it was made with (2.20.2), and our slots change with
    every step: without this it would keep the scale of the first one.
    """
    kept = getattr(getattr(layer, WORKSPACE, {}).get("weight"), "_quantizer", None)
    if kept is not None and state.scale("weight") is not None:
        quantizer = layer.quantizers["scaling_fwd"][1]
        kept.scale, kept.amax = quantizer.scale, quantizer.amax


def wrap(quantized: QuantizedWeight, quantizer: Any, dtype: torch.dtype, kind: str) -> Any:
    """The quantized values as Transformer Engine's tensor; `dtype` is the one it passes for."""
    made = quantized_class(kind)
    data = aligned(quantized.data.view(torch.uint8))
    common = {"shape": data.shape, "dtype": dtype, "fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    common["device"] = data.device
    own = scaling_of(kind).te_quantized_arguments(data, quantized.scale_inv, quantizer)
    return made(**{name: aligned(one) if isinstance(one, torch.Tensor) else one for name, one in own.items()}, **common)
