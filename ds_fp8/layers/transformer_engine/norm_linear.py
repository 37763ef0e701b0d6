"""te.LayerNormLinear in the place of a linear layer, reading the Parameters of the norm before it; see
`layers/fused.py`.

The FP8 side is that of `linear.py`: an autocast of its own, slots of the FP8 state, no `_extra_state`. Tokens are
padded by repeating the last one, not with zeros: the norm would turn zeros into its bias, which might be the largest
amax.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..fp8_linear import as_read
from ..once import once_for_each
from ..ordinary import is_ordinary
from .initialisers import set_initialisers
from .linear import TOKEN_MULTIPLE, TELayerState, bind_slots, note_call, note_products, unpadded
from .names import load
from .quantized_weight import TakesQuantizedWeight, weight_of
from .serial import serial


@functools.cache
def norm_linear_class() -> type[nn.Module]:
    """Our subclass of the installed te.LayerNormLinear."""
    engine = load()

    class TELayerNormLinear(TakesQuantizedWeight, engine.pytorch.LayerNormLinear):  # type: ignore[name-defined,misc]
        """linear(norm(x)) in one call; the norm's Parameters belong to the norm."""

        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state

        @serial
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            state: TELayerState = self.__dict__["te_state"]
            active = state.is_active(self.training)
            special = active and not is_ordinary(input, *self._parameters.values())
            if special or not active or input.numel() == 0:
                note_call(self, special=special)
                normed = norm_of(self, input)
                return state.observe(
                    normed, F.linear(normed, as_read(self.weight), self.bias if self.use_bias else None)
                )
            tokens = input.numel() // self.in_features
            short = -tokens % TOKEN_MULTIPLE
            operand = input
            if short:
                rows = input.reshape(tokens, self.in_features)
                operand = torch.cat([rows, rows[-1:].detach().expand(short, -1)])
            records = state.begin(lambda: norm_of(self, input))
            with engine.autocast(state.scaling):
                bind_slots(self, engine, state, records)
                with weight_of(self, engine, state) as microbatch:
                    output = super().forward(operand, is_first_microbatch=microbatch)
            note_products(self, output, input, state.high)
            output = state.finish(output)
            return unpadded(output, tokens, input.shape) if short else output

    TELayerNormLinear.__module__, TELayerNormLinear.__qualname__ = __name__, "TELayerNormLinear"
    return TELayerNormLinear


def norm_of(layer: Any, input: torch.Tensor) -> torch.Tensor:
    """The norm by torch, for a call without FP8."""
    shape = (layer.in_features,)
    if layer.normalization == "RMSNorm":
        return F.rms_norm(input, shape, layer.layer_norm_weight, layer.eps)
    return F.layer_norm(input, shape, layer.layer_norm_weight, layer.layer_norm_bias, layer.eps)


@once_for_each
def passing_class(norm: type[nn.Module]) -> type[nn.Module]:
    """A norm that passes its input on: its reader normalises. Parameters and names stay where they were."""

    def forward(self: nn.Module, input: torch.Tensor) -> torch.Tensor:
        return input

    return type(f"Fused{norm.__name__}", (norm,), {"forward": forward, "__module__": __name__})


def make_norm_linear(parent: nn.Module, norm_name: str, linear_name: str) -> None:
    """Put a fused layer in the place of the linear layer, and let the norm pass its input on."""
    norm: Any = parent.get_submodule(norm_name)
    linear: Any = parent.get_submodule(linear_name)
    kind = "LayerNorm" if "bias" in norm._parameters else "RMSNorm"
    layer = norm_linear_class()(
        linear.in_features, linear.out_features, eps=norm.eps, bias=linear.use_bias, normalization=kind,
        params_dtype=linear.weight.dtype, device="meta",
    )  # fmt: skip
    set_initialisers(layer)
    for name in list(layer._parameters):
        if name.startswith("layer_norm"):
            del layer._parameters[name]
        else:
            layer._parameters[name] = linear._parameters[name]
    # Not by attribute, which would register them here as well, under new names.
    layer.__dict__["layer_norm_weight"] = norm._parameters["weight"]
    layer.__dict__["layer_norm_bias"] = norm._parameters.get("bias")
    if not linear.use_bias:
        layer.__dict__["bias"] = linear.__dict__["bias"]
    own = frozenset(vars(layer)) | linear.__dict__["_ds_fp8_own"]
    for name, value in vars(linear).items():
        if name not in layer.__dict__:
            layer.__dict__[name] = value
    layer.__dict__["_ds_fp8_own"] = own
    parent._modules[linear_name] = layer.train(linear.training)
    norm.__class__ = passing_class(type(norm))
