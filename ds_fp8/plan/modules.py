"""Which modules are swapped, and the reason for each one that is not.

Every dense layer, module of experts, LayerNorm and RMSNorm of the model (subclasses too) gets one decision. The walk
never stops early: one layer that cannot be converted says nothing about its siblings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..config.settings import LayerSettings
from ..errors import PlanError
from ..recipe import RECIPE_KINDS
from . import conversion_checks, patterns
from .conversion_checks import APART, HARD, MATRICES, SOFT, CandidateModule, first_reason, kind_of
from .decisions import ModuleDecision
from .expert_rules import rule_of
from .expert_speed import TOKENS, least_rows_of
from .experts_found import visited
from .roles import Role, experts_on_gpu, find_roles
from .shapes import DENSE, own_parameter

TARGETS = {
    "torch": {"Linear": "Fp8Linear", "LayerNorm": "Fp8LayerNorm", "RMSNorm": "Fp8RMSNorm"},
    "transformer_engine": {"Linear": "te.Linear", "LayerNorm": "te.LayerNorm", "RMSNorm": "te.RMSNorm"},
}
OURS = {kind: f"Fp8{kind}" for kind in APART}
"""Ours with either backend: Transformer Engine has no such layer."""


@dataclass(frozen=True)
class Rules:
    """Everything that decides about a module, apart from the module.

    first, last  there is a first, a last Linear here to keep: false in the middle of a pipeline
    on_gpu       stacked experts are in FP8 there where that was measured to be faster, unless a pattern names them;
                 norms of model libraries are replaced unless `library_norms` says otherwise: there they were measured
                 faster
    measured     something was measured for experts, on this GPU and with this recipe
    weight_cache  casts of weights serve several micro-batches
    casts        DeepSpeed casts all weights to 16 bits before the first step
    """

    layers: LayerSettings
    recipe: str
    backend: str
    min_features: int
    partial: bool = False
    first: bool = True
    last: bool = True
    on_gpu: bool = False
    measured: bool = False
    weight_cache: bool = False
    casts: bool = False


def decide_modules(model: nn.Module, rules: Rules) -> tuple[tuple[ModuleDecision, ...], tuple[str, ...]]:
    """(decisions in model order, patterns that match nothing here).

    Raises PlanError for a pattern without a match (in a whole model), and for a module that was asked for by name and
    cannot be converted.
    """
    candidates = find_candidates(model, rules)
    names = [_names(candidate) for candidate in candidates]
    missing = _check_patterns(model, rules, names)
    ends = _ends(candidates, rules)
    decisions = [_decide(candidate, name, rules, ends) for candidate, name in zip(candidates, names, strict=True)]
    return tuple(decisions), missing


def find_candidates(model: nn.Module, rules: Rules) -> list[CandidateModule]:
    """Every module of a known kind, with those that share its weight."""
    sharers: dict[int, list[tuple[str, nn.Module]]] = {}
    for fqn, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                sharers.setdefault(id(parameter), []).append((fqn, module))
    roles = find_roles(model)
    if rules.on_gpu:
        roles |= _experts(model, rules)
    wanted = rules.layers.library_norms
    library_norms = rules.on_gpu if wanted is None else wanted
    candidates = []
    for fqn, module in model.named_modules():
        kind = kind_of(module, library_norms=library_norms)
        if kind is None or (fqn == "" and kind not in MATRICES):
            continue
        if "Fp8" in type(module).__name__ and type(module).__module__.startswith("ds_fp8."):
            raise PlanError(
                f"{fqn or 'the model'} is an FP8 layer already; call ds_fp8.layers.restore_layers(model) first."
            )
        mine = sharers.get(id(own_parameter(module, "weight")), [(fqn, module)])
        role = roles.get(fqn)
        candidates.append(CandidateModule(fqn, module, kind, mine, rules.recipe, rules.backend, role, rules.casts))
    return candidates


def _experts(model: nn.Module, rules: Rules) -> dict[str, Role]:
    """fqn -> role of every module of stacked experts, on a GPU."""
    modules, found = dict(model.named_modules()), {}
    for fqn, module in modules.items():
        if not fqn or kind_of(module) != "Experts":
            continue
        rule = rule_of(module)
        count = rule.shapes(module)[0][0] if rule is not None else 0
        visits = (
            count
            if rule is not None and rule.all_visit
            else visited(fqn, count, modules, getattr(model, "config", None))
        )
        rows = least_rows_of(module, visits, rules.weight_cache) if rules.measured else ()
        why = ": on this GPU, or with this recipe, nothing was measured that FP8 makes faster"
        if rules.measured:
            why = f": by measurements FP8 makes none of their products faster in a micro-batch of {TOKENS} tokens"
        found[fqn] = experts_on_gpu(fqn, rows, why)
    return found


def _names(candidate: CandidateModule) -> patterns.ModuleNames:
    cls = type(candidate.module)
    return patterns.ModuleNames(candidate.fqn, (cls.__name__, f"{cls.__module__}.{cls.__qualname__}"))


def _check_patterns(model: nn.Module, rules: Rules, names: Sequence[patterns.ModuleNames]) -> tuple[str, ...]:
    known = {name.fqn for name in names}
    others = [(fqn, type(module).__name__) for fqn, module in model.named_modules() if fqn not in known]
    missing: list[str] = []
    for key in ("include", "exclude"):
        for pattern in patterns.unmatched(getattr(rules.layers, key), names):
            if not rules.partial:
                raise patterns.no_match(key, pattern, names, others)
            missing.append(f"{key}: {pattern}")
    return tuple(missing)


def _ends(candidates: Sequence[CandidateModule], rules: Rules) -> set[str]:
    """Names of the first and the last Linear of the model, when they are to stay in high precision."""
    names = [candidate.fqn for candidate in candidates if candidate.kind in DENSE]
    if not rules.layers.first_last_high_precision or not names:
        return set()
    return ({names[0]} if rules.first else set()) | ({names[-1]} if rules.last else set())


def _decide(candidate: CandidateModule, name: patterns.ModuleNames, rules: Rules, ends: set[str]) -> ModuleDecision:
    shape = candidate.shape

    def keep(reason: str) -> ModuleDecision:
        return ModuleDecision(candidate.fqn, candidate.kind, "keep", "", reason, shape)

    asked = patterns.find(rules.layers.include, name)
    excluded = patterns.find(rules.layers.exclude, name)
    named = asked is not None and patterns.is_literal(asked)
    if excluded is not None:
        if named and patterns.is_literal(excluded) and asked == excluded:
            raise PlanError(f"fp8/layers: {asked!r} is both included and excluded; remove one of the two.")
        return keep(f"excluded by {excluded!r}")
    group = "linear" if candidate.kind in MATRICES else "norm"
    if not getattr(rules.layers, group):
        return keep(f"fp8/layers/{group} is false")
    if rules.layers.include and asked is None:
        return keep("not in include")

    if reason := first_reason(HARD, candidate):
        explicit = named or (
            asked is not None and patterns.names_something(asked) and conversion_checks.unaligned(candidate) == reason
        )
        if explicit:
            raise PlanError(
                f"fp8/layers/include: {asked!r} asks for {candidate.fqn}, which cannot compute in FP8: {reason}.\n"
                f"  Add {candidate.fqn!r} to fp8/layers/exclude{_cure(candidate)}."
            )
        return keep(reason)
    meant = candidate.role is not None and any(
        candidate.role.asked_by(pattern, candidate.fqn) for pattern in rules.layers.include
    )
    if named and (meant or candidate.role is None):
        overruled = first_reason(SOFT, candidate) or (candidate.role.name if candidate.role else None)
        return _swap(candidate, rules, shape, f"{overruled}, but included by name" if overruled else "")
    if reason := first_reason(SOFT, candidate):
        return keep(reason)
    if meant and candidate.role is not None:
        return _swap(candidate, rules, shape, f"{candidate.role.name}, but included by name")
    if candidate.kind in MATRICES and min(shape[-2:]) < rules.min_features:
        return keep(f"fewer than min_features {rules.min_features}: {min(shape[-2:])}")
    if candidate.fqn in ends:
        return keep("first or last Linear")
    if candidate.role is not None and not candidate.role.least_rows:
        return keep(candidate.role.reason())
    return _swap(candidate, rules, shape, "", candidate.role.least_rows if candidate.role is not None else ())


def _swap(
    candidate: CandidateModule, rules: Rules, shape: tuple[int, ...], reason: str, least_rows: tuple[int, ...] = ()
) -> ModuleDecision:
    ours = candidate.kind == "RMSNorm" and not isinstance(candidate.module, nn.RMSNorm)  # a model library's
    target = OURS.get(candidate.kind) or TARGETS["torch" if ours else rules.backend][candidate.kind]
    return ModuleDecision(candidate.fqn, candidate.kind, "swap", target, reason, shape, least_rows)


def _cure(candidate: CandidateModule) -> str:
    if conversion_checks.unaligned(candidate):
        side = RECIPE_KINDS[candidate.recipe].alignment
        return f", or pad its features to a multiple of {side}"
    return ""
