"""`Fp8Linear`: nn.Linear that multiplies in FP8, on any device.

It *is* the old module: `convert` changes the class of an nn.Linear in place, so its Parameters, hooks, buffers, flags
and every reference to it (optimizers, PipelineModule.forward_funcs, tied modules) stay what they were, and
`isinstance(m, nn.Linear)` holds. Its FP8 state is a `LayerFp8State`, which is neither parameter nor buffer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import has_torch_function_unary

from ..errors import LayerError
from ..plan.shapes import shape_of
from . import compiled
from .as_original import HOME, ORIGINAL, refuse_script
from .cuda_products import CudaProducts, takes
from .layer_state import Call, LayerFp8State, QuantizedWeight
from .opaque import opaque
from .ordinary import is_ordinary
from .products import LinearProducts


class Fp8Linear(nn.Linear):
    """y = x @ weight.T + bias with FP8 operands; shapes, dtypes and autocast as nn.Linear."""

    layer_state: LayerFp8State

    @property
    def quantized_weight(self) -> QuantizedWeight | None:
        """Quantized values set from outside (O3). While set and FP8 is active, the layer never reads `weight`."""
        return self.layer_state.quantized_weight

    @quantized_weight.setter
    def quantized_weight(self, quantized: QuantizedWeight | None) -> None:
        self.layer_state.quantized_weight = quantized
        self.layer_state.quantized_weight_of = None if quantized is None else self._parameters.get("weight")
        self.layer_state.forget_weight()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            shape = (self.out_features, self.in_features)
            return compiled.linear(input, self.weight, self.bias, self.layer_state, shape, self.training)
        layer_state = self.layer_state
        weight = self.weight
        if not isinstance(input, torch.Tensor):  # torch's own error, or what its __torch_function__ makes of it
            return F.linear(input, as_read(weight), self.bias)
        call = layer_state.fp8_state.call(layer_state, training=self.training, device=input.device)
        if call is None:
            layer_state.note_call()
            return F.linear(input, as_read(weight), self.bias)
        if (
            layer_state.quantized_weight is None
            or weight is not layer_state.quantized_weight_of
            or not is_ordinary(input, weight, self.bias)
        ):
            call.foreign = weight is not layer_state.quantized_weight_of
            return multiply(input, as_read(weight), self.bias, call)
        # Of a released weight only shape and dtype are looked at in there: as it is, not as it reads.
        with torch._C.DisableTorchFunctionSubclass():
            return multiply(input, weight, self.bias, call)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Fp8Linear:
        """`to`, `cuda`, `to_empty` and their like: the layer's FP8 state follows."""
        super()._apply(fn, recurse)
        self.layer_state.settle(self.weight.device)
        return self

    __prepare_scriptable__ = refuse_script

    def extra_repr(self) -> str:
        recipe = self.layer_state.fp8_state.recipe
        numerics = f"{recipe.kind}, {recipe.forward_format.name} x {recipe.forward_format.name}, "
        numerics += f"{recipe.backward_format.name} x {recipe.forward_format.name}"
        return f"{super().extra_repr()}, {numerics}"


@opaque  # else Dynamo would trace it where it has given a layer's forward up, and change what it does
def multiply(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: Call) -> torch.Tensor:
    """The FP8 linear map for input [..., K] -> [..., N], in the dtype nn.Linear would return.

    In high precision for what FP8 casts have no rule for; see `is_ordinary`.
    """
    if not is_ordinary(input, weight, bias):
        call.layer_state.note_call(special=True)
        return F.linear(input, weight, bias)
    device = input.device.type
    dtype = input.dtype
    if torch.is_autocast_enabled(device) and input.is_floating_point():
        dtype = torch.get_autocast_dtype(device)
    elif dtype != weight.dtype:
        raise LayerError(
            f"{call.layer_state.fqn}: input is {dtype}, weight is {weight.dtype}; a linear layer wants one dtype.\n"
            "  Cast the input, or run the model under torch.autocast."
        )
    columns = shape_of(weight)[1]
    if input.dim() == 0 or input.shape[-1] != columns:
        raise LayerError(
            f"{call.layer_state.fqn}: input has shape {tuple(input.shape)}, its last axis must be {columns}."
        )
    # Asked first: on a GPU each call that finds nothing to do is a part of what the host costs.
    x = input if input.dtype == dtype else input.to(dtype)
    x = x if x.is_contiguous() else x.contiguous()
    if takes(x, weight, call):
        return CudaProducts.apply(x, weight, bias, call, torch.is_grad_enabled())
    with torch.autocast(device, enabled=False):
        return LinearProducts.apply(x, weight, bias, call, torch.is_grad_enabled())


def as_read(weight: torch.Tensor) -> torch.Tensor:
    """A weight that is released (O3; another layer's, tied to this one since) as the values that it reads as."""
    return weight.view_as(weight) if has_torch_function_unary(weight) else weight


def convert(module: nn.Linear, layer_state: LayerFp8State) -> Fp8Linear:
    """Turn `module` into an Fp8Linear, in place."""
    module.__dict__[ORIGINAL] = type(module)
    module.__class__ = Fp8Linear
    module.__dict__["layer_state"] = layer_state
    layer_state.settle(module.weight.device)
    return module  # type: ignore[return-value]


def restore(module: Fp8Linear) -> nn.Linear:
    """The unmodified layer again, in place."""
    module.__class__ = module.__dict__.pop(ORIGINAL)
    del module.__dict__["layer_state"]
    module.__dict__.pop(HOME, None)
    return module
