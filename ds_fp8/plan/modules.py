"""Which modules are swapped, and the reason for each one that is not.

Every Linear, Conv1D, module of experts, LayerNorm and RMSNorm of the model (subclasses too) gets one decision. The walk never stops early: one
layer that cannot be converted says nothing about its siblings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..config.settings import LayerSettings
from ..errors import PlanError
from . import obstacles, patterns
from .decisions import ModuleDecision
from .obstacles import HARD, MATRICES, SOFT, Site, first_reason, kind_of
from .roles import find_roles

TARGETS = {
    "torch": {"Linear": "Fp8Linear", "LayerNorm": "Fp8LayerNorm", "RMSNorm": "Fp8RMSNorm"},
    "transformer_engine": {"Linear": "te.Linear", "LayerNorm": "te.LayerNorm", "RMSNorm": "te.RMSNorm"},
}
OURS = {"Conv1D": "Fp8Conv1D", "Experts": "Fp8Experts"}
"""Ours with either backend: Transformer Engine has no such layer."""


@dataclass(frozen=True)
class Rules:
    """Everything that decides about a module, apart from the module.

    first, last  there is a first, a last Linear here to keep: false in the middle of a pipeline
    """

    layers: LayerSettings
    recipe: str
    backend: str
    min_features: int
    partial: bool = False
    first: bool = True
    last: bool = True


def decide_modules(model: nn.Module, rules: Rules) -> tuple[tuple[ModuleDecision, ...], tuple[str, ...]]:
    """(decisions in model order, patterns that match nothing here).

    Raises PlanError for a pattern without a match (in a whole model), and for a module that was asked for by name and
    cannot be converted.
    """
    sites = find_sites(model, rules)
    candidates = [_candidate(site) for site in sites]
    missing = _check_patterns(model, rules, candidates)
    ends = _ends(sites, rules)
    decisions = [_decide(site, candidate, rules, ends) for site, candidate in zip(sites, candidates, strict=True)]
    return tuple(decisions), missing


def find_sites(model: nn.Module, rules: Rules) -> list[Site]:
    """Every module of a known kind, with those that share its weight."""
    sharers: dict[int, list[tuple[str, nn.Module]]] = {}
    for fqn, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                sharers.setdefault(id(parameter), []).append((fqn, module))
    roles = find_roles(model)
    sites = []
    for fqn, module in model.named_modules():
        kind = kind_of(module)
        if kind is None or (fqn == "" and kind not in MATRICES):
            continue
        if "Fp8" in type(module).__name__ and type(module).__module__.startswith("ds_fp8."):
            raise PlanError(
                f"{fqn or 'the model'} is an FP8 layer already; call ds_fp8.layers.restore_layers(model) first."
            )
        mine = sharers.get(id(module._parameters.get("weight")), [(fqn, module)])
        sites.append(Site(fqn, module, kind, mine, rules.recipe, rules.backend, roles.get(fqn)))
    return sites


def _candidate(site: Site) -> patterns.Candidate:
    cls = type(site.module)
    return patterns.Candidate(site.fqn, (cls.__name__, f"{cls.__module__}.{cls.__qualname__}"))


def _check_patterns(model: nn.Module, rules: Rules, candidates: Sequence[patterns.Candidate]) -> tuple[str, ...]:
    known = {candidate.fqn for candidate in candidates}
    others = [(fqn, type(module).__name__) for fqn, module in model.named_modules() if fqn not in known]
    missing: list[str] = []
    for key in ("include", "exclude"):
        for pattern in patterns.unmatched(getattr(rules.layers, key), candidates):
            if not rules.partial:
                raise patterns.no_match(key, pattern, candidates, others)
            missing.append(f"{key}: {pattern}")
    return tuple(missing)


def _ends(sites: Sequence[Site], rules: Rules) -> set[str]:
    """Names of the first and the last Linear of the model, when they are to stay in high precision."""
    names = [site.fqn for site in sites if site.kind in ("Linear", "Conv1D")]
    if not rules.layers.first_last_high_precision or not names:
        return set()
    return ({names[0]} if rules.first else set()) | ({names[-1]} if rules.last else set())


def _decide(site: Site, candidate: patterns.Candidate, rules: Rules, ends: set[str]) -> ModuleDecision:
    shape = site.shape

    def keep(reason: str) -> ModuleDecision:
        return ModuleDecision(site.fqn, site.kind, "keep", "", reason, shape)

    asked = patterns.find(rules.layers.include, candidate)
    excluded = patterns.find(rules.layers.exclude, candidate)
    named = asked is not None and patterns.is_literal(asked)
    if excluded is not None:
        if named and patterns.is_literal(excluded) and asked == excluded:
            raise PlanError(f"fp8/layers: {asked!r} is both included and excluded; remove one of the two.")
        return keep(f"excluded by {excluded!r}")
    group = "linear" if site.kind in MATRICES else "norm"
    if not getattr(rules.layers, group):
        return keep(f"fp8/layers/{group} is false")
    if rules.layers.include and asked is None:
        return keep("not in include")

    if reason := first_reason(HARD, site):
        explicit = named or (
            asked is not None and patterns.names_something(asked) and obstacles.unaligned(site) == reason
        )
        if explicit:
            raise PlanError(
                f"fp8/layers/include: {asked!r} asks for {site.fqn}, which cannot compute in FP8: {reason}.\n"
                f"  Add {site.fqn!r} to fp8/layers/exclude{_cure(site)}."
            )
        return keep(reason)
    meant = site.role is not None and any(site.role.asked_by(pattern, site.fqn) for pattern in rules.layers.include)
    if named and (meant or site.role is None):
        overruled = first_reason(SOFT, site) or (site.role.name if site.role else None)
        return _swap(site, rules, shape, f"{overruled}, but included by name" if overruled else "")
    if reason := first_reason(SOFT, site):
        return keep(reason)
    if meant:
        return _swap(site, rules, shape, f"{site.role.name}, but included by name")
    if site.kind in MATRICES and min(shape[-2:]) < rules.min_features:
        return keep(f"fewer than min_features {rules.min_features}: {min(shape[-2:])}")
    if site.fqn in ends:
        return keep("first or last Linear")
    if site.role is not None:
        return keep(site.role.reason())
    return _swap(site, rules, shape, "")


def _swap(site: Site, rules: Rules, shape: tuple[int, ...], reason: str) -> ModuleDecision:
    return ModuleDecision(
        site.fqn, site.kind, "swap", OURS.get(site.kind) or TARGETS[rules.backend][site.kind], reason, shape
    )


def _cure(site: Site) -> str:
    if obstacles.unaligned(site):
        side = obstacles.ALIGNMENT[site.recipe]
        return f", or pad its features to a multiple of {side}"
    return ""
