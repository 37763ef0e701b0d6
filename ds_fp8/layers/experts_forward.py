"""The forward of stacked experts in FP8: products of rows sorted by expert, and the code around them by kind of class.

transformers dispatches its experts by `config._experts_implementation`; what an implementation is handed and may read
(`has_gate`, `has_bias`, `is_transposed`, `_apply_gate`) is that registry's contract, and `_transformers` is written to
it. DeepSpeed's AutoEP and registered classes (`ds_fp8.experts.register`) sort the rows themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import LayerError
from ..plan.library_experts import registration_of
from . import expert_gates
from .expert_rows import Visits, biased
from .experts_state import ExpertsState
from .grouped_products import GroupedProducts
from .groups import Groups, Layout
from .ran import note_by_hook


class StackedLinear:
    """`linear(name, x, counts)` of one forward: the product of rows sorted by expert with one stacked parameter."""

    def __init__(self, module: nn.Module, state: ExpertsState):
        self.module, self.state = module, state
        self.groups: Groups | None = None

    def __call__(self, name: str, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        weight = getattr(self.module, name)
        rule, fqn = self.state.rule, self.state.fqn
        if name not in rule.weights:
            raise LayerError(f"{fqn}: {name!r} is none of the weights {', '.join(rule.weights)}.")
        columns = weight.shape[1 if name in rule.transposed else 2]
        if x.dim() != 2 or x.shape[1] != columns:
            raise LayerError(f"{fqn}.{name}: input has shape {tuple(x.shape)}, wanted are [rows, {columns}].")
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if self.groups is None or self.groups.counts is not counts or self.groups.rows != x.shape[0]:
            self.groups = Groups(counts, x.shape[0])
        x = x.to(dtype).contiguous()
        place, grad = self.state.weights[name], torch.is_grad_enabled()
        given = place if place.stands_for(weight) else None
        recipe = self.state.recipe_for(name, x.shape[0] / self.groups.experts, given=given is not None)
        # Of a weight whose quantized values are given only shape and dtype are looked at: as it is, not as it reads.
        as_it_is = nullcontext() if given is None else torch._C.DisableTorchFunctionSubclass()
        with torch.autocast(device, enabled=False), as_it_is:
            trains = self.state.fp8_state.is_training(self.module.training)
            kept = None if given is not None else self.state.kept(name, weight, records=grad and trains)
            layout = Layout(name in rule.transposed, self.state.decision.whole_experts)
            output = GroupedProducts.apply(x, weight, self.groups, recipe, layout, grad, kept, given)
            if self.state.ran is not None:
                if self.state.least_rows and all(recipe.override_linear_precision):
                    self.state.ran.called = self.state.ran.small = True
                note_by_hook(self.state.ran, output, recipe.override_linear_precision, x, weight)
        return output


def forward_of(state: ExpertsState) -> Callable[..., Any]:
    """`forward(module, linear, ...)` of the class that was converted; `linear` is a `StackedLinear`."""
    if state.rule.kind == "registered":
        found = registration_of(state.original)
        if found is None:
            raise LayerError(f"{state.fqn}: {state.original.__name__} was unregistered after it had been converted.")
        return found.forward
    return _transformers if state.rule.kind == "transformers" else _deepspeed


def _transformers(
    module: Any,
    linear: StackedLinear,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """hidden_states [tokens, H], the experts that each token visits [tokens, k] and their weights -> [tokens, H].

    One stable sort puts the visits in the order of the experts; index `num_experts` stands for an expert of another
    rank.
    """
    first, second = linear.state.rule.weights
    visits, count = Visits(top_k_index), module.num_experts
    counts = torch.zeros(count + 1, dtype=torch.int64, device=top_k_index.device)
    counts = counts.scatter_add_(0, visits.owner, torch.ones_like(visits.owner, dtype=torch.int64))[:count]
    rows = linear(first, visits.spread(hidden_states), counts)
    rows = _biased(module, first, rows, linear)
    rows = expert_gates.apply(module, rows) if module.has_gate else module.act_fn(rows)
    rows = _biased(module, second, linear(second, rows, counts), linear)
    if getattr(module, "has_post_expert_norm", False):
        rows = module.post_expert_norm(rows)
    if getattr(module, "_is_expert_parallel", False):
        rows = rows.masked_fill((visits.owner >= count).unsqueeze(-1), 0.0)
    return visits.returned(rows, top_k_weights).to(hidden_states.dtype)


def _biased(module: Any, name: str, rows: torch.Tensor, linear: StackedLinear) -> torch.Tensor:
    return biased(rows, getattr(module, f"{name}_bias"), linear.groups) if module.has_bias else rows  # type: ignore[arg-type]


def _deepspeed(
    module: Any, linear: StackedLinear, x: torch.Tensor, num_tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    """x [rows, H] sorted by expert, and the rows of each [experts] -> [rows, H]; the activation is DeepSpeed's own."""
    activate = sys.modules[linear.state.original.__module__].apply_expert_activation  # type: ignore[attr-defined]
    gate, up = linear("w1", x, num_tokens_per_expert), linear("w3", x, num_tokens_per_expert)
    settings = module.activation, module.activation_alpha, module.activation_limit
    return linear("w2", activate(gate, up, *settings, fused=x.is_cuda), num_tokens_per_expert).type_as(x)
