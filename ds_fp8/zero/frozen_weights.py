"""`fp8.frozen_weights: "fp8"`: of a weight that is never stepped, the FP8 data is all that is kept.

LoRA's base is read in every product and written by nobody. Its quantized values are made once, when DeepSpeed has put
the model on its device, and the 16 bits are given up: 1 byte per parameter instead of 2, and no cast in any step. The
Parameter stays where it is, as a `ReleasedWeight` (`weights_released.py`): whoever reads it (a norm for DoRA, a
checkpoint, an evaluation in high precision) gets the values that the layer multiplies with. Unlike at O3 this rank has
all of the weight, so whoever writes (`merge_and_unload`, a load) is not refused: the 16 bits come back first, for good.

One scale for the tensor (for each expert of a stack), or one for each tile under recipe `block`, and powers of two:
e4m3 has 3 mantissa bits, so decoded values are exact in bf16, and casting them again gives the same values. A merged or
a resumed model is the one that was trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import QuantizedWeight, holders_of
from ..layers.recipes import scaling_of
from ..numerics.dtypes import torch_dtype
from ..plan import Plan
from . import weights_released, weights_wrapped
from .guards import put_in_again


class FrozenSource(weights_released.Source):
    """The quantized frozen weight, and the way back to 16 bits."""

    __slots__ = ("holder", "layer", "param", "thawed")

    def __init__(self, name: str, quantized: QuantizedWeight, param: nn.Parameter, layer: nn.Module, holder: Any):
        super().__init__(name, quantized)
        self.param, self.layer, self.holder, self.thawed = param, layer, holder, False

    def thaw(self, memory: Tensor | None = None) -> None:
        """16 bits again: in `memory`, decoded values that somebody is about to write to, or in new memory."""
        if self.thawed:
            return
        param = self.param
        values = self.values(param.dtype) if memory is None else memory
        weights_released.take_back(param)
        param.data = values
        put_in_again(self.layer, param)
        self.holder.quantized_weight = None
        self.thawed = True


class FrozenWeights:
    """The frozen weights of one engine's model.

    freeze  16 bits -> quantized values, of all that are not kept so already
    thaw    quantized values -> 16 bits
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.model, self.names = model, plan.fp8.frozen_weights
        self.recipe = plan.fp8.recipe
        self.sources: dict[str, FrozenSource] = {}

    @torch.no_grad()
    def freeze(self) -> None:
        weights_wrapped.begin(self)
        for name in self.names:
            fqn, _, place = name.rpartition(".")
            layer = self.model.get_submodule(fqn)
            weight, holder = getattr(layer, place), holders_of(layer)[place]
            if weights_released.is_released(weight):
                continue
            quantized = self._quantize(weight.detach())
            source = FrozenSource(name, quantized, weight, layer, holder)
            holder.quantized_weight = quantized
            holder.layer_state.quantized_weight_of = weight
            weights_released.release(weight, weight.dtype, weight.device, tuple(weight.shape), source)
            put_in_again(layer, weight)
            self.sources[name] = source

    def _quantize(self, weight: Tensor) -> QuantizedWeight:
        """Of a stack of experts, each by itself."""
        scaling, fmt = scaling_of(self.recipe.kind), self.recipe.forward_format
        if weight.dim() == 2:
            return scaling.quantize_frozen(weight, fmt)
        data = torch.empty(weight.shape, dtype=torch_dtype(fmt), device=weight.device)
        scales = []
        for one, out in zip(weight, data, strict=True):
            quantized, scale_inv = scaling.quantize_frozen(one, fmt)
            out.copy_(quantized)
            scales.append(scale_inv)
        return QuantizedWeight(data, torch.stack(scales))

    @torch.no_grad()
    def thaw(self) -> None:
        for source in self.sources.values():
            source.thaw()
        self.sources.clear()
        weights_wrapped.end(self)
