"""FP8 layers as torch.compile reads them: operators, and nothing that a guard would watch.

    ds_fp8::linear_forward    casts input and weight, fprop
    ds_fp8::linear_backward   casts grad_output, dgrad, wgrad
    ds_fp8::weight_values     a released weight's values, for a product in high precision (O3, eval mode)

An eager layer reads Python state in each call: whether `start_step` is reached, scales of this step, quantized values
set from outside. A compiler would make constants of it, and compile anew when it changes. So a traced layer is an
operator that the compiler does not look into: shapes and dtypes are known beforehand, and the state is found when the
operator runs, by an anchor (`anchors`). The graph is whole, norms and activations around the layer are fused, attention
keeps its fast kernels, and the layer's numbers are those of the eager layer.

Amaxes are raised to a running maximum, which the operators' schemas do not declare. That is safe. A maximum may be
taken any number of times and in any order, so a compiler may repeat or move a call (activation checkpointing). Nothing
in a graph reads the amaxes, and scales are constant within a step.

Casts inside the operators, not before them: an H100 showed that a cast which Inductor fuses into the norm or SwiGLU
before it gains less than 1 % of a Llama block, because the transposed data and the amax then are launches of their own.

The host's time for a call counts, because a compiled model of small layers waits for it. So the operators are defined
by `torch.library.Library`, whose calls cost a fifth of `custom_op`'s, take few arguments, and are differentiated by an
autograd.Function around them, which exists only while the model is traced.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch.overrides import has_torch_function_unary

from ..errors import LayerError
from ..formats import E4M3
from ..numerics.dtypes import torch_dtype
from ..recipe import RECIPES
from .anchors import layer_state_of
from .compiled_products import Carried, carries_rows, multiplies_transposed, run_backward, run_forward
from .layer_state import LayerFp8State
from .ordinary import in_transform
from .products import refuse_second_derivative
from .recipes import scaling_of

TRAINING, GRAD = 1, 2
CARRIES_INPUT, CARRIES_WEIGHT = 16, 32
DGRAD, WGRAD, BGRAD = 64, 128, 256
RECIPE = 512
"""Bits of an operator's `flags`: constants of a traced call. From RECIPE on the number of the recipe in `RECIPES`."""

_library = torch.library.Library("ds_fp8", "DEF")
_library.define(
    "linear_forward(Tensor input, Tensor weight, Tensor? bias, Tensor anchor, int n, int flags) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_backward(Tensor grad_output, Tensor? input, Tensor weight, Tensor? bias, Tensor quantized_input, "
    "Tensor scale_inv, Tensor quantized_weight, Tensor anchor, int k, int flags) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define("weight_values(Tensor weight, Tensor anchor) -> Tensor")


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    layer_state: LayerFp8State,
    shape: tuple[int, int],
    training: bool,
) -> torch.Tensor:
    """The forward of an Fp8Linear, or of a layer like it, while it is traced; `shape` (N, K) of the weight.

    weight  the Parameter; [K, N] where `layer_state.transposed`

    Reads of `layer_state` only what never changes: all else would be guarded, or differ between equal layers.
    """
    turned = layer_state.transposed
    training = training or (layer_state.trains_in_eval and torch.is_grad_enabled())
    if not (training or layer_state.runs_in_eval) or in_transform() or input.is_nested:
        if has_torch_function_unary(weight) and not _is_exported():  # released (O3)
            if in_transform():
                return _in_high_precision(input, weight, bias, turned)
            with torch._C.DisableTorchFunctionSubclass():
                values = _Values.apply(weight.t() if turned else weight, layer_state.anchor)
                return F.linear(input, values, bias)
        return F.linear(input, weight.t() if turned else weight, bias)
    with torch._C.DisableTorchFunctionSubclass():  # a weight that is released (O3) is passed on, not decoded
        return _operator(input, weight.t() if turned else weight, bias, layer_state, shape, training)


@torch.compiler.disable
def _in_high_precision(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, turned: bool
) -> torch.Tensor:
    """Outside of the graph: `_Values` has no rule for transforms of torch.func, a released weight's own reading has."""
    return F.linear(input, weight.t() if turned else weight, bias)


def _is_exported() -> bool:
    """Whether torch.export traces. Its flag, since Dynamo took `torch.compiler.is_exporting()` for true in every
    compilation (torch 2.11).
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)


def _operator(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    layer_state: LayerFp8State,
    shape: tuple[int, int],
    training: bool,
) -> torch.Tensor:
    device, dtype = input.device.type, input.dtype
    if torch.is_autocast_enabled(device) and input.is_floating_point():
        dtype = torch.get_autocast_dtype(device)
    elif dtype != weight.dtype:
        _refuse(layer_state, f"input is {dtype}, weight is {weight.dtype}; a linear layer wants one dtype.")
    if input.dim() == 0 or input.shape[-1] != shape[1]:
        _refuse(layer_state, f"input has shape {tuple(input.shape)}, its last axis must be {shape[1]}.")
    x = input.to(dtype).contiguous()
    flags = training * TRAINING | layer_state.recipe_number * RECIPE
    if not torch.is_grad_enabled():
        return torch.ops.ds_fp8.linear_forward(x, weight, bias, layer_state.anchor, shape[0], flags)[0]
    flags |= GRAD
    if weight.requires_grad:
        flags |= WGRAD | layer_state.carries_input * CARRIES_INPUT
    if x.requires_grad:
        is_whole = not hasattr(weight, "ds_id")
        flags |= DGRAD | (layer_state.carries_weight and multiplies_transposed(x) and is_whole) * CARRIES_WEIGHT
    if bias is not None and bias.requires_grad:
        flags |= BGRAD
    return _Linear.apply(x, weight, bias, layer_state.anchor, shape[0], flags)


@torch.compiler.disable
def _refuse(layer_state: LayerFp8State, problem: str) -> NoReturn:
    """Outside of the graph: an error that Dynamo meets while it traces makes it trace on in what is called instead."""
    raise LayerError(f"{layer_state.fqn}: {problem}")


class _Linear(torch.autograd.Function):
    """Differentiates `linear_forward`; traced by Dynamo, which leaves the two operators in its graphs."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        anchor: torch.Tensor,
        n: int,
        flags: int,
    ) -> torch.Tensor:
        output, *carried = torch.ops.ds_fp8.linear_forward(x, weight, bias, anchor, n, flags)
        saves_input = flags & WGRAD and not flags & CARRIES_INPUT
        ctx.save_for_backward(x if saves_input else None, weight, bias, anchor, *carried)
        ctx.k, ctx.flags = x.shape[-1], flags
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, anchor, *carried = ctx.saved_tensors
        flags = ctx.flags
        grad_input, grad_weight, grad_bias = torch.ops.ds_fp8.linear_backward(
            grad_output, x, weight, bias, *carried, anchor, ctx.k, flags
        )
        return (
            grad_input if flags & DGRAD else None,
            grad_weight if flags & WGRAD else None,
            grad_bias if flags & BGRAD else None,
            None,
            None,
            None,
        )


class _Values(torch.autograd.Function):
    """A released weight as it reads; the gradient is the weight's own."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.ops.ds_fp8.weight_values(weight, anchor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


@torch.library.impl(_library, "weight_values", "CompositeExplicitAutograd")
def _weight_values(weight: Any, anchor: Any) -> torch.Tensor:
    quantized = layer_state_of(anchor).quantized_weight
    assert quantized is not None, "a released weight has quantized values"
    return quantized.values(weight.dtype)


@torch.library.register_fake("ds_fp8::weight_values", lib=_library)
def _(weight: Any, anchor: Any) -> torch.Tensor:
    return weight.new_empty(weight.shape)


@torch.library.impl(_library, "linear_forward", "CompositeExplicitAutograd")
def _forward(x: Any, weight: Any, bias: Any, anchor: Any, n: int, flags: int) -> tuple[torch.Tensor, ...]:
    output, carried = run_forward(
        x,
        weight,
        bias,
        layer_state_of(anchor),
        training=bool(flags & TRAINING),
        grad=bool(flags & GRAD),
        carries_input=bool(flags & CARRIES_INPUT),
        carries_weight=bool(flags & CARRIES_WEIGHT),
    )
    return output, *carried


@torch.library.register_fake("ds_fp8::linear_forward", lib=_library)
def _(x: Any, weight: Any, bias: Any, anchor: Any, n: int, flags: int) -> tuple[torch.Tensor, ...]:
    k = x.shape[-1]
    rows = x.numel() // k
    scaling = scaling_of(RECIPES[flags // RECIPE])
    shape = (rows, k) if carries_rows(x, scaling) else (k, rows)
    both = scaling.transposes  # one scale per tensor: that of the weight is carried beside that of the input

    def made(bits: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return x.new_empty(shape if flags & bits else (0,), dtype=dtype)

    return (
        x.new_empty((*x.shape[:-1], n)),
        made(CARRIES_INPUT, shape, torch_dtype(E4M3)),
        made(CARRIES_INPUT | CARRIES_WEIGHT * both, scaling.carried_scale_shape(k, rows)),
        made(CARRIES_WEIGHT, (k, n), torch_dtype(E4M3)),
    )


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
def _backward(
    grad_output: Any, x: Any, weight: Any, bias: Any, quantized_input: Any, scale_inv: Any, quantized_weight: Any,
    anchor: Any, k: int, flags: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    layer_state = layer_state_of(anchor)
    if grad_output.requires_grad:
        # A debugging backend (`eager`): Dynamo turns gradients off in here, so torch would leave this layer out of a
        # second derivative. Where AOTAutograd has made the backward, torch itself refuses.
        refuse_second_derivative(layer_state, asked=True)
    found = run_backward(
        grad_output,
        x,
        weight,
        bias,
        Carried(quantized_input, scale_inv, quantized_weight),
        layer_state,
        training=bool(flags & TRAINING),
        needs=(bool(flags & DGRAD), bool(flags & WGRAD), bool(flags & BGRAD)),
    )
    return tuple(grad_output.new_empty(0) if one is None else one for one in found)


@torch.library.register_fake("ds_fp8::linear_backward", lib=_library)
def _(
    grad_output: Any, x: Any, weight: Any, bias: Any, quantized_input: Any, scale_inv: Any, quantized_weight: Any,
    anchor: Any, k: int, flags: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    n = grad_output.shape[-1]
    return (
        grad_output.new_empty((*grad_output.shape[:-1], k) if flags & DGRAD else (0,)),
        grad_output.new_empty((n, k) if flags & WGRAD else (0,), dtype=weight.dtype if flags & WGRAD else None),
        grad_output.new_empty((n,) if flags & BGRAD else (0,), dtype=bias.dtype if flags & BGRAD else None),
    )
