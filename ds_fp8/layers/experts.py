"""Stacked experts that compute in FP8: a module's class is changed in place, its parameters and names are not.

transformers dispatches its experts by `config._experts_implementation`; what an implementation is handed and may read
(`has_gate`, `has_bias`, `is_transposed`, `_apply_gate`) is that registry's contract, and `_transformers` below is
written to it. It is not entered into the registry, because one configuration is shared by experts that are converted
and experts that are kept, is read when a model generates, and is saved with it. Where FP8 is off (eval, before
`start_step`) the module computes as it would have: by whatever implementation its configuration names.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import has_torch_function_unary

from ..errors import BackendError, LayerError
from ..plan import ModuleDecision
from ..plan.expert_rules import ExpertRule, rule_of
from ..plan.expert_speed import high_precision
from ..plan.library_experts import registration_of
from ..recipe import HighPrecision, Recipe
from . import compiled_experts, expert_gates
from .anchors import make_anchor
from .as_original import ORIGINAL
from .expert_rows import Visits, biased
from .grouped_products import GroupedProducts
from .groups import Groups, Layout
from .layer_state import QuantizedWeight, may_keep
from .once import once_for_each
from .opaque import opaque
from .operands import CachedWeight
from .ran import Ran, note_by_hook

if TYPE_CHECKING:
    from .fp8_state import ModelFp8State

STATE = "_ds_fp8_experts"
"""Attribute that holds the state of converted experts."""


class ExpertWeight:
    """Where quantized values of one stack are handed to its experts (O3, frozen weights); see `LayerFp8State`.

    quantized_weight     QuantizedWeight with data as the Parameter lies; experts then never read the Parameter
    quantized_weight_of  the Parameter that it was made of
    """

    quantized_weight: QuantizedWeight | None = None
    quantized_weight_of: Any = None

    @property
    def layer_state(self) -> ExpertWeight:
        """What is set from outside is set here, as in a layer's own state."""
        return self

    def stands_for(self, weight: torch.Tensor) -> bool:
        return self.quantized_weight is not None and weight is self.quantized_weight_of


def holders_of(module: nn.Module) -> dict[str, Any]:
    """Name of a weight -> where its quantized values are set from outside: the layer itself, or the place of a stack
    (`ExpertWeight`).
    """
    if STATE in vars(module):
        return dict(vars(module)[STATE].weights)
    return {"weight": module} if hasattr(module, "quantized_weight") else {}


class ExpertsState:
    """What converted experts know: the FP8 state of their model, and how they compute.

    fp8_state  whose plan and step say whether FP8 is on
    rule       names and layout of the parameters
    decision   the plan's: with fewer rows than its `least_rows` products run in high precision
    weights    by name, where quantized values are set from outside
    ran        what the products did in the first step, while that lasts (`ran.py`)
    is_shared  several engines step these weights, so no quantized values of theirs are kept
    runs_in_eval, trains_in_eval, traces, anchor
               what a compiled forward reads: whether it computes in FP8, is traced at all, and how its operators find
               this state (`compiled_experts`, `anchors`)
    """

    is_shared = False
    ran: Ran | None = None

    def __init__(
        self, fp8_state: ModelFp8State, rule: ExpertRule, original: type[nn.Module], decision: ModuleDecision
    ):  # fmt: skip
        self.fp8_state, self.rule, self.original = fp8_state, rule, original
        self.decision, self.fqn, self.least_rows = decision, decision.fqn, decision.least_rows
        self.weights = {name: ExpertWeight() for name in rule.weights}
        self.in_high_precision = _with(fp8_state.recipe, HighPrecision(True, True, True))
        self.runs_in_eval, self.trains_in_eval = fp8_state.plan.eval, fp8_state.trains_in_eval
        self.traces = rule.kind == "transformers"
        self.anchor: torch.Tensor | None = None
        self._anchors: list[torch.Tensor] = []
        self.forget_weight()
        fp8_state.holders.add(self)

    def settle(self, device: torch.device) -> None:
        """The module is on `device` now; see `LayerFp8State.settle`."""
        if self.anchor is None or self.anchor.device != device:
            self.anchor = make_anchor(self, device)
            self._anchors.append(self.anchor)

    def forget_weight(self) -> None:
        """Drop quantized values that were kept for the rest of an optimizer step."""
        self._kept: dict[str, tuple[CachedWeight, dict[str, Any]]] = {}

    def kept(self, name: str, weight: torch.Tensor, *, records: bool) -> dict[str, Any] | None:
        """Where quantized values of this weight are kept, by purpose; None where they may not be (`may_keep`).

        records  in training, with gradients
        """
        if not (records and may_keep(weight, self)):
            return None
        if name not in self._kept or not self._kept[name][0].is_of(weight):
            self._kept[name] = CachedWeight(weight, weight._version, weight.data_ptr(), None), {}
        return self._kept[name][1]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without what it keeps."""
        return ExpertsState, (self.fp8_state, self.rule, self.original, self.decision)

    def recipe_for(self, name: str, rows: float, *, given: bool) -> Recipe:
        """The recipe of one weight's products, with `rows` rows per expert.

        given  its quantized values were set from outside: to decode them for a product in high precision costs more
               than that saves
        """
        recipe = self.fp8_state.recipe
        if not self.least_rows:
            return recipe
        place = 2 * self.rule.weights.index(name)
        least = (self.least_rows[place], self.least_rows[place + 1])
        return _with(recipe, HighPrecision(wgrad=True) if given else high_precision(least, rows))

    def is_whole(self, module: nn.Module) -> bool:
        """Not cut by ZeRO 3, which gathers weights in hooks that a graph would not call."""
        return not hasattr(getattr(module, self.rule.weights[0]), "ds_id")

    def is_active(self, module: nn.Module) -> bool:
        return (self.fp8_state.is_training(module.training) or self.fp8_state.plan.eval) and not self.fp8_state.warming


class Fp8Experts:
    """Mixed into the class of a converted module, in front of it."""

    def forward(self, *args: Any, **named: Any) -> Any:
        state: ExpertsState = self._ds_fp8_experts  # type: ignore[assignment, attr-defined]
        if torch.compiler.is_compiling() and state.traces and state.is_whole(self):  # type: ignore[arg-type]
            training = self.training or (state.trains_in_eval and torch.is_grad_enabled())  # type: ignore[attr-defined]
            if training or state.runs_in_eval:
                return compiled_experts.forward(self, state, *args, **named)
            if not has_torch_function_unary(getattr(self, state.rule.weights[0])):  # released (O3)
                return super().forward(*args, **named)  # type: ignore[misc]
        return self._run(*args, **named)

    @opaque
    def _run(self, *args: Any, **named: Any) -> Any:
        state: ExpertsState = self.__dict__[STATE]
        if not state.is_active(self):  # type: ignore[arg-type]
            if state.ran is not None:
                state.ran.called = True
            with _readable(self, state):  # type: ignore[arg-type]
                return state.original.forward(self, *args, **named)
        return _forward_of(state)(self, _Linear(self, state), *args, **named)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`to`, `cuda` and their like: the name for compiled graphs follows."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        self.__dict__[STATE].settle(getattr(self, self.__dict__[STATE].rule.weights[0]).device)
        return self

    def extra_repr(self) -> str:
        state = self.__dict__[STATE]
        numerics = state.fp8_state.recipe.of_experts(whole=state.decision.whole_experts)
        return f"{super().extra_repr()} {numerics}".strip()  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as the module it was, and converted again: the class itself exists in this process
        only.
        """
        attributes = {name: value for name, value in self.__dict__.items() if name != STATE}
        return _rebuilt, (self.__dict__[STATE].original, self.__dict__[STATE], attributes)


def convert(module: nn.Module, decision: ModuleDecision, fp8_state: ModelFp8State) -> ExpertsState:
    """Turn `module` into FP8 experts, in place; its state. Raises BackendError if it is none of a known kind."""
    rule = rule_of(module)
    if rule is None:
        raise BackendError(f"{decision.fqn}: {type(module).__name__} holds no experts of a known kind; plan again.")
    state = ExpertsState(fp8_state, rule, type(module), decision)
    take_state(module, state)
    return state


def take_state(module: nn.Module, state: ExpertsState | None) -> None:
    """Compute by `state` from now on; None: as the class computed before, though the module stays ours."""
    if state is None:
        module.__class__ = module.__dict__[STATE].original
        return
    module.__class__ = fp8_class(state.original)
    module.__dict__[STATE] = state
    state.settle(module.get_parameter(state.rule.weights[0]).device)


@contextmanager
def _readable(module: nn.Module, state: ExpertsState) -> Iterator[None]:
    """Released weights as the values that they read as, decoded once: a loop over experts reads them again and again.
    Their gradients go to the Parameters.
    """
    released = {name: module._parameters[name] for name in state.rule.weights if name in module._parameters}
    released = {name: weight for name, weight in released.items() if has_torch_function_unary(weight)}
    for name, weight in released.items():
        assert weight is not None
        module._parameters[name] = weight.view_as(weight)  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters.update(released)


def restore(module: nn.Module) -> nn.Module:
    """The unmodified module again, in place."""
    module.__class__ = module.__dict__.pop(STATE).original
    module.__dict__.pop(ORIGINAL, None)
    return module


@once_for_each
def fp8_class(original: type[nn.Module]) -> type[nn.Module]:
    """The FP8 version of a class of experts."""
    return type(f"Fp8{original.__name__}", (Fp8Experts, original), {"__module__": __name__})


def _rebuilt(original: type[nn.Module], state: ExpertsState, attributes: dict[str, Any]) -> nn.Module:
    module = original.__new__(original)
    module.__dict__.update(attributes)
    take_state(module, state)
    return module


@functools.cache
def _with(recipe: Recipe, high: HighPrecision) -> Recipe:
    """`recipe` with these products in high precision too."""
    both = HighPrecision(*(one or other for one, other in zip(recipe.override_linear_precision, high, strict=True)))
    return dataclasses.replace(recipe, override_linear_precision=both)


class _Linear:
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


def _forward_of(state: ExpertsState) -> Callable[..., Any]:
    if state.rule.kind == "registered":
        found = registration_of(state.original)
        if found is None:
            raise LayerError(f"{state.fqn}: {state.original.__name__} was unregistered after it had been converted.")
        return found.forward
    return _transformers if state.rule.kind == "transformers" else _deepspeed


def _transformers(
    module: Any, linear: _Linear, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
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


def _biased(module: Any, name: str, rows: torch.Tensor, linear: _Linear) -> torch.Tensor:
    return biased(rows, getattr(module, f"{name}_bias"), linear.groups) if module.has_bias else rows  # type: ignore[arg-type]


def _deepspeed(module: Any, linear: _Linear, x: torch.Tensor, num_tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """x [rows, H] sorted by expert, and the rows of each -> [rows, H]; the activation is DeepSpeed's own."""
    activate = sys.modules[linear.state.original.__module__].apply_expert_activation  # type: ignore[attr-defined]
    gate, up = linear("w1", x, num_tokens_per_expert), linear("w3", x, num_tokens_per_expert)
    settings = module.activation, module.activation_alpha, module.activation_limit
    return linear("w2", activate(gate, up, *settings, fused=x.is_cuda), num_tokens_per_expert).type_as(x)
