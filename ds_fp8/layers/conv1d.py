"""GPT-2's linear layer, whose weight lies as [in, out], in FP8: the class changes in place, names and shapes do not.

It is `transformers.pytorch_utils.Conv1D`, known by its structure. The products are those of `Fp8Linear` on the transposed
view of the weight, so recipes, scales and telemetry are the same; autograd turns the gradient back. What differs: under
ZeRO 3 the quantized values made in the forward are kept for dgrad (one byte per weight), since a view cannot be
gathered again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import compiled
from .as_original import ORIGINAL
from .fp8_linear import multiply
from .layer_state import LayerFp8State
from .once import once_for_each


class Fp8Conv1D:
    """Mixed into the class of a converted layer, in front of it."""

    layer_state: LayerFp8State

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            shape = (self.weight.shape[1], self.weight.shape[0])  # type: ignore[attr-defined]
            return compiled.linear(x, self.weight.t(), self.bias, self.layer_state, shape, self.training)  # type: ignore[attr-defined]
        layer_state = self.layer_state
        call = layer_state.fp8_state.call(layer_state, training=self.training, device=x.device)  # type: ignore[attr-defined]
        if call is None:
            layer_state.note_call()
            return super().forward(x)  # type: ignore[misc]
        return multiply(x, self.weight.t(), self.bias, call)  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Fp8Conv1D:
        """`to`, `cuda`, `to_empty` and their like: the layer's FP8 state follows."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        self.layer_state.settle(self.weight.device)  # type: ignore[attr-defined]
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as the layer it was, and converted again: the class itself exists in this process only."""
        attributes = {name: value for name, value in self.__dict__.items() if name not in (ORIGINAL, "layer_state")}
        return _rebuilt, (self.__dict__[ORIGINAL], self.layer_state, attributes)


@once_for_each
def fp8_class(original: type[nn.Module]) -> type[nn.Module]:
    """The FP8 version of a class of layers."""
    return type(f"Fp8{original.__name__}", (Fp8Conv1D, original), {"__module__": __name__})


def convert(module: nn.Module, layer_state: LayerFp8State) -> nn.Module:
    """Turn a Conv1D into its FP8 version, in place; `fp8_linear.restore` gives it back."""
    module.__dict__[ORIGINAL] = type(module)
    module.__class__ = fp8_class(type(module))
    module.__dict__["layer_state"] = layer_state
    layer_state.settle(module.weight.device)  # type: ignore[union-attr, arg-type]
    return module


def _rebuilt(original: type[nn.Module], layer_state: LayerFp8State, attributes: dict[str, Any]) -> nn.Module:
    module = original.__new__(original)
    module.__dict__.update(attributes)
    return convert(module, layer_state)
