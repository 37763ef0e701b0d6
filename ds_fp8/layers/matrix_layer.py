"""Layers of libraries with one weight (`plan.shapes.LAYER_TYPES`) in FP8: the class changes in place, names and shapes
do not.

The products are those of `Fp8Linear` on the weight, or on the transposed view of one that lies as [in, out] (GPT-2's
Conv1D), so recipes, scales and telemetry are the same; autograd turns the gradient back. Quantized values from outside
(O3, frozen weights) are handed over as the Parameter lies; the products read them transposed, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..plan.shapes import LAYER_TYPES
from . import compiled
from .as_original import ORIGINAL
from .fp8_linear import as_read, multiply
from .layer_state import LayerFp8State, QuantizedWeight
from .once import once_for_each
from .ordinary import is_ordinary


class Fp8MatrixLayer:
    """Mixed into the class of a converted layer, in front of it."""

    layer_state: LayerFp8State
    weight: nn.Parameter
    bias: nn.Parameter | None
    _parameters: dict[str, nn.Parameter | None]
    training: bool
    fp8_transposed: bool

    @property
    def quantized_weight(self) -> QuantizedWeight | None:
        """See `Fp8Linear.quantized_weight`; as the Parameter lies."""
        return self._turned(self.layer_state.quantized_weight)

    @quantized_weight.setter
    def quantized_weight(self, quantized: QuantizedWeight | None) -> None:
        self.layer_state.quantized_weight = self._turned(quantized)
        self.layer_state.quantized_weight_of = None if quantized is None else self._parameters.get("weight")
        self.layer_state.forget_weight()

    def _turned(self, quantized: QuantizedWeight | None) -> QuantizedWeight | None:
        return quantized.t() if quantized is not None and self.fp8_transposed else quantized

    def _matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """[out, in]"""
        return weight.t() if self.fp8_transposed else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            rows, columns = self.weight.shape
            shape = (columns, rows) if self.fp8_transposed else (rows, columns)
            return compiled.linear(x, self.weight, self.bias, self.layer_state, shape, self.training)
        if not isinstance(x, torch.Tensor):  # the library's own error
            return super().forward(x)  # type: ignore[misc]
        layer_state, weight = self.layer_state, self.weight
        call = layer_state.fp8_state.call(layer_state, training=self.training, device=x.device)
        if call is None:
            layer_state.note_call()
            return super().forward(x)  # type: ignore[misc]
        call.foreign = weight is not layer_state.quantized_weight_of
        if call.quantized_weight is None or not is_ordinary(x, weight, self.bias):
            return multiply(x, self._matrix(as_read(weight)), self.bias, call)
        # Of a released weight only shape and dtype are looked at in there: as it is, not as it reads.
        with torch._C.DisableTorchFunctionSubclass():
            return multiply(x, self._matrix(weight), self.bias, call)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Fp8MatrixLayer:
        """`to`, `cuda`, `to_empty` and their like: the layer's FP8 state follows."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        self.layer_state.settle(self.weight.device)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as the layer it was, and converted again: the class itself exists in this process only."""
        attributes = {name: value for name, value in self.__dict__.items() if name not in (ORIGINAL, "layer_state")}
        return _rebuilt, (self.__dict__[ORIGINAL], self.layer_state, attributes)


@once_for_each
def fp8_class(original: type[nn.Module]) -> type[nn.Module]:
    """The FP8 version of a class of layers."""
    transposed = LAYER_TYPES[original.__name__].transposed
    return type(
        f"Fp8{original.__name__}", (Fp8MatrixLayer, original), {"__module__": __name__, "fp8_transposed": transposed}
    )


def convert(module: nn.Module, layer_state: LayerFp8State) -> nn.Module:
    """Turn a layer into its FP8 version, in place; `fp8_linear.restore` gives it back."""
    module.__dict__[ORIGINAL] = type(module)
    module.__class__ = fp8_class(type(module))
    module.__dict__["layer_state"] = layer_state
    layer_state.transposed = LAYER_TYPES[module.__dict__[ORIGINAL].__name__].transposed
    layer_state.settle(module.weight.device)  # type: ignore[union-attr, arg-type]
    return module


def _rebuilt(original: type[nn.Module], layer_state: LayerFp8State, attributes: dict[str, Any]) -> nn.Module:
    module = original.__new__(original)
    module.__dict__.update(attributes)
    return convert(module, layer_state)
