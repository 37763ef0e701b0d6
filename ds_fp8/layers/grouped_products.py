"""The three products of stacked experts as one autograd function; `grouped_rows` and `grouped_blocks` say how.

A product that `override_linear_precision` keeps in high precision uses the operands as they came. Weights are cast in
each forward and again in the backward, from the Parameter itself: under ZeRO 3 it exists only while its module runs,
and nothing of the size of the weights is held between the two, unless `weight_cache` keeps them for the optimizer step.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import LayerError
from ..recipe import Recipe
from . import grouped_high
from .batched_gradients import one_by_one
from .groups import Groups, Layout, Stack
from .operands import split_released
from .recipes import scaling_of


class GroupedProducts(torch.autograd.Function):
    """output [S, N] = rows of x [S, K], each with its own expert's weight.

    x           [S, K] in the compute dtype, sorted by expert
    weight      [E, N, K], or [E, K, N], in its own dtype
    groups      which rows are whose
    layout      how the weights lie, and are cast
    grad        whether a backward may follow (inside `forward` autograd is always off)
    kept        quantized values of this weight that earlier forwards of the optimizer step have made; None keeps none
    given       where its quantized values are set from outside (`experts_state.ExpertWeight`), also at the time of the
                backward: under ZeRO 3 they come again then, as the weight itself would
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, groups: Groups, recipe: Recipe, layout: Layout, grad: bool,
        kept: dict[str, Any] | None = None, given: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        high, grouped, dtype = recipe.override_linear_precision, scaling_of(recipe.kind).grouped, x.dtype
        dgrad_follows = grad and ctx.needs_input_grad[0] and not high.dgrad
        values = None if given is None else given.quantized_weight
        stack = Stack(weight, layout, dgrad_follows=dgrad_follows, kept=kept, given=values)
        # fprop   output [S, N] = input [S, K] @ weight.T [K, N]     e4m3 x e4m3
        if high.fprop:
            output = grouped_high.by_rows(x, stack.straight, groups)
        else:
            output = grouped.fprop(x, stack, groups, dtype, recipe.forward_format)
        inputs: tuple[torch.Tensor, ...] = ()
        if grad and ctx.needs_input_grad[1]:
            inputs = (x,) if high.wgrad else grouped.keep_for_wgrad(x, groups, recipe.forward_format)
        amaxes = stack.column_amaxes
        if kept is not None and amaxes is not None:
            # What is saved may not depend on who casts: checkpointing compares the recompute's with the forward's.
            kept["column_amaxes"], amaxes = amaxes, None
        saved, ctx.released = split_released(weight, values)
        ctx.save_for_backward(saved, amaxes, *inputs)
        ctx.kept, ctx.given, ctx.groups, ctx.recipe, ctx.layout, ctx.dtype = kept, given, groups, recipe, layout, dtype
        return output

    @staticmethod
    @one_by_one
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise LayerError(
                "experts in FP8: a second derivative was asked for (create_graph=True), but FP8 casts have none.\n"
                "  Exclude the experts in fp8/layers/exclude, or differentiate once."
            )
        weight, column_amaxes, *inputs = ctx.saved_tensors
        weight = weight if ctx.released is None else ctx.released
        groups, recipe, dtype = ctx.groups, ctx.recipe, ctx.dtype
        high, grouped = recipe.override_linear_precision, scaling_of(recipe.kind).grouped
        transposed = ctx.layout.transposed
        formats = recipe.forward_format, recipe.backward_format
        grad_output = grad_output.to(dtype).contiguous()
        grad_input = grad_weight = None
        with torch.autocast(grad_output.device.type, enabled=False):
            # dgrad   grad_input [S, K] = grad_output [S, N] @ weight [N, K]
            if ctx.needs_input_grad[0]:
                if ctx.kept is not None:
                    column_amaxes = ctx.kept.get("column_amaxes")
                values = None if ctx.given is None else ctx.given.quantized_weight
                stack = Stack(weight, ctx.layout, column_amaxes=column_amaxes, kept=ctx.kept, given=values)
                if high.dgrad:
                    grad_input = grouped_high.by_rows(grad_output, stack.straight.transpose(1, 2), groups)
                else:
                    grad_input = grouped.dgrad(grad_output, stack, groups, dtype, *formats)
            # wgrad   grad_weight [E, N, K] = grad_output.T @ input, for each expert, as the weight lies
            if ctx.needs_input_grad[1]:
                if high.wgrad:
                    grad_weight = grouped_high.wgrad(grad_output, inputs[0], groups, weight.dtype, transposed)
                else:
                    grad_weight = grouped.wgrad(
                        grad_output, tuple(inputs), groups, weight.dtype, formats[1], transposed=transposed
                    )
        return grad_input, grad_weight, None, None, None, None, None, None
