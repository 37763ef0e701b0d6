"""The plan in a few lines: what is converted, what is not and why, and which settings are really in force."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..levels import ABSENT
from . import expert_speed
from .conversion_checks import MATRICES
from .decisions import ModuleDecision, Plan
from .share import share_line, share_warning, unknown_line

SHOWN = 4
"""Names listed before a banner says `and N more`."""


def banner(plan: Plan) -> str:
    lines = [*_layer_lines(plan), *_setting_lines(plan), *plan.notes]
    if plan.unmatched:
        lines.append(f"patterns that match nothing in this pipeline stage: {', '.join(plan.unmatched)}")
    lines.append(f"plan {plan.digest()[:12]}")
    return "\n".join(f"ds_fp8: {line}" for line in lines)


def _layer_lines(plan: Plan) -> list[str]:
    if not plan.fp8.enabled:
        return []
    lines = []
    for kind in (*MATRICES, "LayerNorm", "RMSNorm"):
        mine = [decision for decision in plan.modules if decision.kind == kind]
        if not mine:
            continue
        swaps = [decision for decision in mine if decision.is_swap]
        target = f" -> {swaps[0].target}" if swaps else ""
        numerics = _numerics(kind, plan, swaps)
        line = f"{len(swaps)} of {len(mine)} {kind}{target}{numerics if swaps else ''}"
        lines.append(line + _kept([decision for decision in mine if not decision.is_swap]))
    return lines


def _numerics(kind: str, plan: Plan, swaps: Sequence[ModuleDecision]) -> str:
    recipe = plan.fp8.recipe
    if kind == "Experts":
        whole = [one for one in swaps if one.whole_experts]
        return f" ({recipe.of_experts(whole=bool(whole))}{expert_speed.in_words(swaps)})"
    return f" ({recipe})" if kind in MATRICES else " (fp32 inside, high precision out)"


def _kept(kept: Sequence[ModuleDecision]) -> str:
    """`; kept 2: lm_head (not a multiple of 16: 50257), router (excluded ...)`; equal reasons are reported once."""
    if not kept:
        return ""
    groups: dict[str, list[str]] = {}
    for decision in kept:
        groups.setdefault(decision.reason, []).append(decision.fqn or "the model itself")
    reasons = []
    for reason, names in groups.items():
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        reasons.append(f"{shown} ({reason})")
    return f"; kept {len(kept)}: {', '.join(reasons)}"


def _setting_lines(plan: Plan) -> list[str]:
    lines = []
    if plan.fp8.enabled:
        fp8, recipe = plan.fp8, plan.fp8.recipe
        settings = [f"backend {fp8.backend} on {plan.device}{' (emulated)' if fp8.emulated else ''}"]
        if recipe.keeps_history:
            settings.append(f"interval {recipe.interval}")
            settings.append(f"reduce_amax {_on(recipe.reduce_amax)}")
        high = [name for name, is_high in recipe.override_linear_precision._asdict().items() if is_high]
        if high:
            settings.append(f"{', '.join(high)} in high precision")
        settings.append(f"weight_cache {_on(fp8.weight_cache)}")
        settings.append(f"eval {_on(fp8.eval)}")
        if fp8.start_step:
            settings.append(f"high precision until step {fp8.start_step}")
        if fp8.fuse:
            settings.append("fused")
        if fp8.compile is not None:
            what = "repeated blocks" if fp8.compile.regional else "the whole model"
            mode = "" if fp8.compile.mode == "default" else f", {fp8.compile.mode}"
            settings.append(f"{what} compiled by torch.compile{mode}")
        lines.append("; ".join(settings))
        if fp8.frozen_weights:
            lines.append(f"frozen weights of {_layers_of(plan)} are kept in FP8 alone (1 byte per parameter)")
        lines.append(share_line(plan))
        if unknown := unknown_line(plan):
            lines.append(unknown)
        if warning := share_warning(plan):
            lines.append(warning)
    if plan.optim is not None:
        level = plan.optim.level
        formats = {"exp_avg": level.exp_avg, "exp_avg_sq": level.exp_avg_sq, "master": level.master}
        states = ", ".join(f"{name} {fmt}" for name, fmt in formats.items() if fmt != ABSENT)
        parts = [
            f"msamp {level.name}: {states} ({level.rounding} rounding, {plan.base_dtype} base)",
            f"gradients on the wire {_wire(level.gradient_wire)}"
            + (f" ({level.gradient_wire_scope})" if level.gradient_wire_scope == "inter_node" else ""),
            f"weights {_wire(level.weight_wire)}",
            f"ZeRO stage {plan.zero_stage}, {plan.world_size} rank{'s' if plan.world_size != 1 else ''}",
        ]
        lines.append("; ".join(parts))
    lines += _released_line(plan)
    return lines


def _layers_of(plan: Plan) -> str:
    """`14 Linear and 2 Experts`: the layers whose frozen weights are kept so."""
    holders = {name.rpartition(".")[0] for name in plan.fp8.frozen_weights}
    kinds = Counter(decision.kind for decision in plan.modules if decision.fqn in holders)
    return " and ".join(f"{count} {kind}" for kind, count in kinds.items())


def _released_line(plan: Plan) -> list[str]:
    """What O3 means for whoever reads a weight himself."""
    count = len(plan.comm.fp8_weights) if plan.comm is not None else 0
    if not count:
        return []
    kept = "" if plan.zero_stage == 3 else "; model.state_dict() is for all ranks at once"
    return [
        (
            f"{count} weight{'s' if count != 1 else ''} only in FP8 between steps: read outside of their layer they "
            f"have its FP8 values, writes are refused{kept}; in 16 bits inside deepspeed.zero.GatheredParameters, or by"
            " msamp/weight_wire_exclude; an extension in C++ that is no operator of torch.ops takes weight.detach()"
        )
    ]


def _on(value: bool) -> str:
    return "on" if value else "off"


def _wire(name: str) -> str:
    return "in high precision" if name == "none" else name
