"""What converted experts know: the FP8 state of their model, the rule of their class, quantized values to use again."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..plan import ModuleDecision
from ..plan.expert_rules import ExpertRule
from ..plan.expert_speed import high_precision
from ..recipe import HighPrecision, Recipe
from .anchors import make_anchor
from .layer_state import QuantizedWeight, may_keep
from .operands import CachedWeight

if TYPE_CHECKING:
    from .fp8_state import ModelFp8State
    from .ran import Ran

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
    """Of one module of converted experts.

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


@functools.cache
def _with(recipe: Recipe, high: HighPrecision) -> Recipe:
    """`recipe` with these products in high precision too."""
    both = HighPrecision(*(one or other for one, other in zip(recipe.override_linear_precision, high, strict=True)))
    return dataclasses.replace(recipe, override_linear_precision=both)
