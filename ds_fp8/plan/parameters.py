"""For each parameter: how its states, master, gradient and weight are kept and sent.

States and gradients follow the level whatever the parameter is, by blocks of the flat partition: nothing is skipped
because it is small, a bias or a norm. Only the wire of weights (O3) asks who uses them: the quantized values of an FP8
layer are usable by that layer alone, so a weight travels in quantized form if one module holds it, and multiplies with
it in FP8: a Linear, one of `shapes.LAYER_TYPES`, or stacked experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from ..algorithms import MOMENTS
from ..levels import ABSENT, Level
from ..recipe import Recipe
from .decisions import ModuleDecision, ParameterDecision
from .expert_rules import rule_of
from .shapes import DENSE, numel_of, shape_of


def decide_parameters(
    model: nn.Module,
    modules: tuple[ModuleDecision, ...],
    recipe: Recipe | None,
    level: Level | None,
    base_dtype: str,
    excluded: Sequence[str] = (),
    moments: Sequence[str] = MOMENTS,
) -> tuple[ParameterDecision, ...]:
    """One decision for each Parameter object; a shared one appears once, under its first name.

    excluded  globs of parameters that travel in 16 bits (msamp/weight_wire_exclude)
    moments   the states that DeepSpeed's optimizer keeps where `level` is None
    """
    owners = _owners(model, modules, recipe)
    decisions = []
    for fqn, parameter in model.named_parameters():
        frozen = not parameter.requires_grad
        kept = level if level is not None and not frozen else None
        owner = owners.get(id(parameter)) if not frozen else None  # "" is the model itself
        decisions.append(
            ParameterDecision(
                fqn=fqn,
                shape=shape_of(parameter),
                numel=numel_of(parameter),
                dtype=base_dtype,
                frozen=frozen,
                exp_avg=kept.exp_avg if kept else _plain(frozen),
                exp_avg_sq=kept.exp_avg_sq if kept else _plain(frozen or "exp_avg_sq" not in moments),
                master=kept.master if kept else _plain(frozen),
                gradient_wire=kept.gradient_wire if kept else "none",
                weight_wire=kept.weight_wire if kept and owner is not None and not _is_named(fqn, excluded) else "none",
                owner=owner or "",
            )
        )
    return tuple(decisions)


def _is_named(fqn: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter is meant by one of the globs: by its own name, or by that of its module."""
    names = (fqn, fqn.rpartition(".")[0])
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def unmatched_exclusions(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Globs of msamp/weight_wire_exclude that mean no parameter of the model."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return [pattern for pattern in patterns if not any(_is_named(name, (pattern,)) for name in names)]


def frozen_weights(model: nn.Module, modules: tuple[ModuleDecision, ...], recipe: Recipe) -> tuple[str, ...]:
    """Names of the weights of FP8 layers that are frozen, and their layer's alone: their quantized values can be all
    that is kept of them.
    """
    owners = _owners(model, modules, recipe)
    return tuple(
        name for name, parameter in model.named_parameters() if not parameter.requires_grad and id(parameter) in owners
    )


def with_scales_of_whole_experts(
    model: nn.Module, modules: tuple[ModuleDecision, ...], by_owner: Collection[str]
) -> tuple[ModuleDecision, ...]:
    """The decisions, where experts whose weights are cast outside of their module take one scale per expert, and those
    quantized values in fprop and dgrad with any number of rows.

    by_owner  names of the parameters that are cast by their owner: at O3, or once for all while they are frozen
    """
    holders = {name.rpartition(".")[0] for name in by_owner}
    return tuple(
        replace(one, whole_experts=True, least_rows=(1,) * len(one.least_rows))
        if one.kind == "Experts" and one.is_swap and one.fqn in holders
        else one
        for one in modules
    )


def _plain(absent: bool) -> str:
    return ABSENT if absent else "fp32"


def _owners(model: nn.Module, modules: tuple[ModuleDecision, ...], recipe: Recipe | None) -> dict[int, str]:
    """id of a weight -> the FP8 layer that can use its quantized values for all that it computes."""
    if recipe is None or recipe.override_linear_precision.fprop or recipe.override_linear_precision.dgrad:
        # A product in high precision reads the 16-bit weight.
        return {}
    swapped: dict[str, tuple[str, ...]]
    swapped = {decision.fqn: ("weight",) for decision in modules if decision.is_swap and decision.kind in DENSE}
    for decision in modules:
        if decision.is_swap and decision.kind == "Experts":
            rule = rule_of(model.get_submodule(decision.fqn))
            swapped[decision.fqn] = () if rule is None else rule.weights
    holders: dict[int, list[tuple[str, str]]] = {}
    for fqn, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((fqn, name))
    return {
        key: places[0][0]
        for key, places in holders.items()
        if len(places) == 1 and places[0][1] in swapped.get(places[0][0], ())
    }
