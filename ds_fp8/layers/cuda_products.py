"""The three products on a GPU with FP8 tensor cores: the fast road of `products.LinearProducts`, to the same result.

    fprop   output      [M, N] = input       [M, K] @ weight.T [K, N]     e4m3 x e4m3
    dgrad   grad_input  [M, K] = grad_output [M, N] @ weight   [N, K]     e5m2 x e4m3   (HYBRID; e4m3 x e4m3 with E4M3)
    wgrad   grad_weight [N, K] = grad_output.T [N, M] @ input  [M, K]     e5m2 x e4m3   (HYBRID)

Why a road of its own: below some thousand tokens a linear layer costs what the host needs to start it. So a pass makes
three casts (one launch each: codes, transposed codes, amax into the book's slot) and three `torch._scaled_mm`, and nothing
else; nothing waits for the device. The weight's codes, both ways round, live until the weight changes (`weight_cache`).
Codes and scales are those of `products`; what this road does not take (`takes`) goes there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..capabilities import FP8_SINCE
from ..errors import BackendError
from ..formats import BLOCK_SIZE
from ..kernels import dense, library_for
from .gemm import aligned
from .operands import TENSOR, TILES, Operand, cast_weight, is_sharded
from .page import Call, Page

STEP = 16
"""Rows and columns of every operand, in elements: what `torch._scaled_mm` takes without padding."""

TILE_STEP = 512
"""Sides of a weight under the block recipe: with four tiles the rows of their scales begin at 16 bytes by themselves."""

MULTIPLIES_BLOCKS = True
"""Whether block scales go to `torch._scaled_mm`, which multiplies with them on Hopper (torch 2.11, CUDA 13)."""

COMPUTE = (torch.bfloat16, torch.float16)


def takes(input: torch.Tensor, weight: torch.Tensor, call: Call) -> bool:
    """Whether `CudaProducts` can do this call; `input` [M, K] in the compute dtype."""
    if not input.is_cuda or call.warming or input.dtype not in COMPUTE:
        return False
    page = call.page
    if is_sharded(weight):  # exists only while its layer runs; the plain road knows when to cast it again
        return False
    if page.fast_step is None:
        page.fast_step = _fast_step(page, weight)
    step, rows = page.fast_step, input.shape[0]
    return step > 0 and rows > 0 and rows % step == 0 and weight.is_contiguous()


def _fast_step(page: Page, weight: torch.Tensor) -> int:
    """What the number of rows must be a multiple of; 0 when this layer never takes the fast road."""
    recipe = page.book.recipe
    high = recipe.override_linear_precision
    blocks = recipe.kind == "block"
    if blocks and not (MULTIPLIES_BLOCKS and torch.cuda.get_device_capability(weight.device)[0] == 9):
        return 0
    if high.fprop or high.dgrad or high.wgrad or any(size % (TILE_STEP if blocks else STEP) for size in weight.shape):
        return 0
    if torch.cuda.get_device_capability(weight.device) < FP8_SINCE or library_for(weight.device) is None:
        return 0
    return BLOCK_SIZE if blocks else STEP


class CudaProducts(torch.autograd.Function):
    """output = input @ weight.T + bias; arguments as those of `LinearProducts`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: Call, grad: bool
    ) -> torch.Tensor:
        needs_dgrad, needs_wgrad = grad and ctx.needs_input_grad[0], grad and ctx.needs_input_grad[1]
        dtype = input.dtype
        left, kept_input = _cast(input, call, call.page.input_column, plain=True, turned=needs_wgrad)
        right, kept_weight = _cast_weight(weight, call, turned=needs_dgrad)
        # fprop   output [M, N] = input [M, K] @ weight.T [K, N]     e4m3 x e4m3
        output = torch._scaled_mm(
            left[0],
            right[0].t(),
            scale_a=left[1],
            scale_b=right[1].t(),
            bias=None if bias is None else bias.to(dtype),
            out_dtype=dtype,
            use_fast_accum=call.page.book.recipe.kind != "block",
        )
        ctx.save_for_backward(*kept_weight, *kept_input)
        ctx.call, ctx.dtype, ctx.weight_dtype = call, dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        call: Call = ctx.call
        if torch.is_grad_enabled():
            raise BackendError(
                f"{call.page.fqn}: a second derivative was asked for (create_graph=True), but FP8 casts have none.\n"
                "  Exclude this layer in fp8/layers/exclude, or differentiate once."
            )
        weight, weight_scale_inv, kept, kept_scale_inv = ctx.saved_tensors
        needs_dgrad, needs_wgrad, needs_bias = ctx.needs_input_grad[:3]
        grad_output = grad_output.to(ctx.dtype).contiguous()
        column = call.page.grad_output_column
        grad_input = grad_weight = grad_bias = None
        if needs_dgrad or needs_wgrad:
            plain, turned = _cast(grad_output, call, column, plain=needs_dgrad, turned=needs_wgrad)
            if not needs_bias:
                # A cast saturates infinities; where no sum in high precision shows an overflow, the scale does.
                shown = turned if needs_wgrad else plain
                shown[1] = _poisoned(shown[1], grad_output, call)
            # dgrad   grad_input [M, K] = grad_output [M, N] @ weight [N, K]     e5m2 x e4m3  (HYBRID)
            if needs_dgrad:
                grad_input = torch._scaled_mm(
                    plain[0], weight.t(), scale_a=plain[1], scale_b=weight_scale_inv.t(), out_dtype=ctx.dtype
                )
            # wgrad   grad_weight [N, K] = grad_output.T [N, M] @ input [M, K]     e5m2 x e4m3  (HYBRID)
            if needs_wgrad:
                grad_weight = torch._scaled_mm(
                    turned[0], kept.t(), scale_a=turned[1], scale_b=kept_scale_inv.t(), out_dtype=ctx.weight_dtype
                )
        if needs_bias:
            grad_bias = grad_output.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None, None


Coded = list[Any]
"""[codes, scale_inv]; codes are None where nobody asked for them."""


def _cast(x: torch.Tensor, call: Call, column: int, *, plain: bool, turned: bool) -> tuple[Coded, Coded]:
    """An input or grad_output `x` as it lies and transposed; under delayed scaling its amax is recorded if it counts."""
    casts = library_for(x.device).operands
    fmt, kind = call.format_of(column), call.page.book.recipe.kind
    if kind == "block":
        found = casts.cast_groups(x, fmt, plain=plain, turned=turned)
        return [[None, None] if one is None else list(one) for one in found]  # type: ignore[return-value]
    if kind == "current":
        codes, scale_inv, _ = casts.cast_current(x, fmt, plain=plain, turned=turned)
    else:
        slot = call.slot(column) if call.records_column(column) else None
        scale, scale_inv = call.scale(column)
        codes = casts.cast_delayed(x, scale, fmt, slot, plain=plain, turned=turned)
    return [codes[0], scale_inv], [codes[1], scale_inv]


def _cast_weight(weight: torch.Tensor, call: Call, *, turned: bool) -> tuple[Coded, Coded]:
    """The weight [N, K] as codes both ways round: set from outside (O3), cached, or cast now; see `cast_weight`."""
    page = call.page
    if page.weight_codes is not None:
        return _both(cast_weight(weight, call), turned=turned)
    key = (page.book.weights_version, weight._version, weight.data_ptr()) if call.caches_weight else None
    found = page.cached_weight
    if key is None or page.cached_key != key or found is None:
        found = _cast_weight_now(weight, call, turned=turned)
        if key is not None and (call.records or not call.recipe.is_delayed) and not torch.is_inference_mode_enabled():
            # As in `cast_weight`: a forward that does not record must not rob the next one of recording.
            page.cached_key, page.cached_weight = key, found
            page.cached_scale = None if found.scale is None else (found.scale, found.scale_inv)
    elif turned and found.turned is None:  # cached by a forward without gradients
        found = page.cached_weight = replace(found, turned=_turned(found))
    return _both(found, turned=turned)


def _cast_weight_now(weight: torch.Tensor, call: Call, *, turned: bool) -> Operand:
    column, fmt = call.page.weight_column, call.recipe.forward_format
    casts = library_for(weight.device).operands
    weight = weight.detach()
    if call.recipe.kind == "block":
        plain, back = casts.cast_tiles(weight, fmt, turned=turned)
        return Operand(*plain, TILES, turned=None if back is None else Operand(*back, TILES))
    if call.recipe.kind == "current":
        (codes, back), scale_inv, amax = casts.cast_current(weight, fmt, turned=turned)
        return Operand(codes, scale_inv[0], amax=amax[0], turned=None if back is None else Operand(back, scale_inv[0]))
    scale, scale_inv = call.scale(column)
    slot = call.slot(column) if call.records else None
    codes, back = casts.cast_delayed(weight, scale, fmt, slot, turned=turned)
    return Operand(codes, scale_inv, TENSOR, scale, turned=None if back is None else Operand(back, scale_inv))


def _turned(operand: Operand) -> Operand:
    return Operand(dense(operand.data.t()), operand.scale_inv.t(), operand.extent)


def _both(operand: Operand, *, turned: bool) -> tuple[Coded, Coded]:
    """The operand and, if wanted, its transpose, with scales where cuBLASLt can read them."""
    if not turned:
        return [operand.data, _fit(operand.scale_inv)], [None, None]
    back = operand.turned or _turned(operand)
    return [operand.data, _fit(operand.scale_inv)], [back.data, _fit(back.scale_inv)]


def _fit(scale_inv: torch.Tensor) -> torch.Tensor:
    return aligned(scale_inv.contiguous())


def _poisoned(scale_inv: torch.Tensor, x: torch.Tensor, call: Call) -> torch.Tensor:
    """`scale_inv`, as NaN if `x` is not finite; no host sync."""
    column = call.page.grad_output_column
    if call.recipe.is_delayed and call.records_gradient:
        amax = call.slot(column)  # the cast has just raised it; an older infinity in it poisons the same step anyway
    else:
        amax = library_for(x.device).amax(x)
    return torch.add(scale_inv, amax, alpha=0.0)
