"""Stacked experts of transformers as torch.compile reads them: two operators for each product, all else is traced.

    ds_fp8::experts_forward    casts rows and weights, fprop
    ds_fp8::experts_backward   casts grad_output, weights and rows; dgrad, wgrad

As for a linear layer (`compiled`), what changes from step to step (`start_step`, quantized values from outside, how
many rows each expert has) is behind an operator, which finds the state of its experts by an anchor. Sort, gates, biases
and sums are in the graph, where the compiler fuses them. The input is kept in high precision for wgrad, and cast in the
backward: to the data that the forward of an eager module keeps.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import LayerError
from ..recipe import HighPrecision
from . import grouped_high
from .anchors import layer_state_of
from .groups import Groups, Layout, Stack
from .recipes import scaling_of

TRAINING, GRAD, DGRAD, WGRAD = 1, 2, 4, 8
"""Bits of an operator's `flags`: constants of a traced call."""

_library = torch.library.Library("ds_fp8", "FRAGMENT")
_library.define(
    "experts_forward(Tensor x, Tensor weight, Tensor counts, Tensor anchor, int place, int flags) -> Tensor"
)
_library.define(
    "experts_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor counts, Tensor anchor, int place, int flags) "
    "-> (Tensor, Tensor)"
)


def forward(module: Any, state: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
            top_k_weights: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """`experts_forward._transformers` while it is traced; the same arguments and result."""
    each, count = top_k_index.shape[-1], module.num_experts
    owner, order = top_k_index.reshape(-1).sort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    counts = torch.zeros(count + 1, dtype=torch.int64, device=owner.device)
    counts = counts.scatter_add_(0, owner, torch.ones_like(owner, dtype=torch.int64))[:count]
    tokens = hidden_states.unsqueeze(1).expand(-1, each, -1).reshape(-1, hidden_states.shape[-1])
    rows = _product(module, state, 0, _Permuted.apply(tokens, order, back), counts)
    rows = _biased(module, state, 0, rows, owner)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = _biased(module, state, 1, _product(module, state, 1, rows, counts), owner)
    if getattr(module, "has_post_expert_norm", False):
        rows = module.post_expert_norm(rows)
    if getattr(module, "_is_expert_parallel", False):
        rows = rows.masked_fill((owner >= count).unsqueeze(-1), 0.0)
    rows = _Permuted.apply(rows, back, order) * top_k_weights.reshape(-1, 1)
    return rows.view(-1, each, rows.shape[-1]).sum(1).to(hidden_states.dtype)


def _biased(module: Any, state: Any, place: int, rows: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    if not module.has_bias:
        return rows
    bias = getattr(module, f"{state.rule.weights[place]}_bias")
    return rows + bias[owner.clamp(max=bias.shape[0] - 1)].to(rows.dtype)


def _product(module: Any, state: Any, place: int, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Rows sorted by expert with the stack number `place`; reads of the state only what never changes."""
    weight = getattr(module, state.rule.weights[place])
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    x = x.to(dtype).contiguous()
    with torch._C.DisableTorchFunctionSubclass():  # a weight that is released (O3) is passed on, not decoded
        flags = TRAINING * bool(module.training or state.trains_in_eval)
        if not torch.is_grad_enabled():
            return torch.ops.ds_fp8.experts_forward(x, weight, counts, state.anchor, place, flags)
        flags |= GRAD | DGRAD * x.requires_grad | WGRAD * weight.requires_grad
        return _Product.apply(x, weight, counts, state.anchor, place, flags)


class _Permuted(torch.autograd.Function):
    """rows[order]; `back` is the inverse permutation, so the gradient needs no sums."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(back)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return grad[back], None, None


class _Product(torch.autograd.Function):
    """Differentiates `experts_forward`; traced by Dynamo, which leaves the two operators in its graphs."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, anchor: torch.Tensor, place: int,
        flags: int,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, counts, anchor)
        ctx.place, ctx.flags = place, flags
        return torch.ops.ds_fp8.experts_forward(x, weight, counts, anchor, place, flags)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, counts, anchor = ctx.saved_tensors
        grad_input, grad_weight = torch.ops.ds_fp8.experts_backward(
            grad_output, x, weight, counts, anchor, ctx.place, ctx.flags
        )
        return (
            grad_input if ctx.flags & DGRAD else None,
            grad_weight if ctx.flags & WGRAD else None,
            None,
            None,
            None,
            None,
        )


class _Call:
    """One product of an operator: its state, recipe and operands."""

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, anchor: Any, place: int, flags: int
    ):
        self.state: Any = layer_state_of(anchor)
        name = self.state.rule.weights[place]
        self.groups = Groups(counts, x.shape[0])
        values = self.state.weights[name].quantized_weight
        if self.state.fp8_state.warming:
            self.recipe = self.state.in_high_precision
        else:
            self.recipe = self.state.recipe_for(name, x.shape[0] / self.groups.experts, given=values is not None)
        self.high: HighPrecision = self.recipe.override_linear_precision
        self.grouped: Any = scaling_of(self.recipe.kind).grouped
        records = bool(flags & GRAD and flags & TRAINING)
        kept = None if values is not None else self.state.kept(name, weight, records=records)
        if x.is_cuda and torch.cuda.is_current_stream_capturing() and (kept is not None or values is not None):
            raise LayerError(
                f"{self.state.fqn}: a CUDA graph was asked for (mode='reduce-overhead'), which would replay weights of "
                "an older step (weight_cache, O3, frozen_weights).\n  Compile without CUDA graphs."
            )
        layout = Layout(name in self.state.rule.transposed, self.state.decision.whole_experts)
        self.transposed = layout.transposed
        self.stack = Stack(weight, layout, kept=kept, given=values)


@torch.library.impl(_library, "experts_forward", "CompositeExplicitAutograd")
def _forward(x: Any, weight: Any, counts: Any, anchor: Any, place: int, flags: int) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        call = _Call(x, weight, counts, anchor, place, flags)
        if call.state.ran is not None:
            call.state.ran.called = True
            call.state.ran.small |= bool(call.state.least_rows and all(call.high))
            call.state.ran.forward(call.high, dgrad=bool(flags & DGRAD), wgrad=bool(flags & WGRAD))
        # fprop   output [S, N] = input [S, K] @ weight.T [K, N]
        if call.high.fprop:
            return grouped_high.by_rows(x, call.stack.straight, call.groups)
        return call.grouped.fprop(x, call.stack, call.groups, x.dtype, call.recipe.forward_format)


@torch.library.register_fake("ds_fp8::experts_forward", lib=_library)
def _(x: Any, weight: Any, counts: Any, anchor: Any, place: int, flags: int) -> torch.Tensor:
    return x.new_empty((x.shape[0], _outputs(x, weight)))


def _outputs(x: torch.Tensor, weight: torch.Tensor) -> int:
    """Columns of the product: the other axis than that which is summed; of a square weight either."""
    return weight.shape[2] if weight.shape[1] == x.shape[1] else weight.shape[1]


@torch.library.impl(_library, "experts_backward", "CompositeExplicitAutograd")
def _backward(
    grad_output: Any, x: Any, weight: Any, counts: Any, anchor: Any, place: int, flags: int
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_output = grad_output.to(x.dtype).contiguous()
    grad_input, grad_weight = x.new_empty(0), weight.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):
        call = _Call(x, weight, counts, anchor, place, flags)
        formats = call.recipe.forward_format, call.recipe.backward_format
        # dgrad   grad_input [S, K] = grad_output [S, N] @ weight [N, K]
        if flags & DGRAD and call.high.dgrad:
            grad_input = grouped_high.by_rows(grad_output, call.stack.straight.transpose(1, 2), call.groups)
        elif flags & DGRAD:
            grad_input = call.grouped.dgrad(grad_output, call.stack, call.groups, x.dtype, *formats)
        # wgrad   grad_weight [E, N, K] = grad_output.T @ input, for each expert, as the weight lies
        if flags & WGRAD and call.high.wgrad:
            grad_weight = grouped_high.wgrad(grad_output, x, call.groups, weight.dtype, call.transposed)
        elif flags & WGRAD:
            kept = call.grouped.keep_for_wgrad(x, call.groups, formats[0])
            grad_weight = call.grouped.wgrad(
                grad_output, kept, call.groups, weight.dtype, formats[1], transposed=call.transposed
            )
        if call.state.ran is not None:
            call.state.ran.backward(call.high, dgrad=bool(flags & DGRAD), wgrad=bool(flags & WGRAD))
    return grad_input, grad_weight


@torch.library.register_fake("ds_fp8::experts_backward", lib=_library)
def _(
    grad_output: Any, x: Any, weight: Any, counts: Any, anchor: Any, place: int, flags: int
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_weight = weight.new_empty(weight.shape if flags & WGRAD else (0,))
    return x.new_empty(x.shape if flags & DGRAD else (0,)), grad_weight
