"""`make_plan`: from settings, model, device and world size to a `Plan`.

Settings that need no model are decided first (`effective.py`), then modules (`modules.py`), then parameters
(`parameters.py`). The plan depends on nothing that differs between ranks of a data-parallel group, so all of them make
the same one; `digest()` proves it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from .. import capabilities
from ..algorithms import moments_of
from ..config.settings import Settings
from ..errors import PlanError
from . import performance
from .conversion_checks import APART, MATRICES
from .decisions import CommPlan, ModuleDecision, OptimPlan, ParameterDecision, Plan
from .effective import Effective, decide_settings
from .flops import Counted, count_products
from .modules import Rules, decide_modules
from .parameters import decide_parameters, frozen_layers, unmatched_exclusions


def make_plan(
    model: nn.Module,
    settings: Settings,
    *,
    device: Any = "cpu",
    world_size: int = 1,
    host: capabilities.Host | None = None,
) -> Plan:
    """Decide everything. The model is only looked at.

    device      where the model will run (torch.device or its name)
    world_size  ranks that share the data-parallel work
    host        facts about the device; asked of this machine when None
    Raises PlanError when something that was asked for cannot be done, or when nothing would be converted.
    """
    if world_size < 1:
        raise PlanError(f"world_size is {world_size}; a job has at least one rank.")
    host = capabilities.host(device) if host is None else host
    effective = decide_settings(settings, host)
    partial, first, last = _pipeline_place(model)
    modules: tuple[ModuleDecision, ...] = ()
    unmatched: tuple[str, ...] = ()
    if effective.fp8.enabled:
        rules = Rules(
            settings.fp8.layers,
            effective.fp8.recipe.kind,
            effective.fp8.backend,
            effective.fp8.min_features,
            partial,
            first,
            last,
            on_gpu=host.device_type == "cuda",
        )
        modules, unmatched = decide_modules(model, rules)
        _require_conversion(modules, settings, partial)
        effective = _keep_frozen(model, modules, effective, settings, partial)
    counted = count_products(model, modules) if effective.fp8.enabled else Counted((), (), 0)
    facts = settings.deepspeed
    recipe = effective.fp8.recipe if effective.fp8.enabled else None
    excluded = settings.msamp.weight_wire_exclude
    moments = moments_of(facts.optimizer)
    parameters = decide_parameters(model, modules, recipe, effective.level, facts.base_dtype, excluded, moments)
    unmatched = (*unmatched, *_unmatched_weights(model, excluded, partial))
    return Plan(
        modules=modules,
        parameters=parameters,
        fp8=effective.fp8,
        optim=_optim(effective, settings),
        comm=_comm(effective, parameters, partial, settings),
        zero_stage=facts.zero_stage,
        world_size=world_size,
        base_dtype=facts.base_dtype,
        device=str(host),
        products=counted.products,
        unknown=counted.unknown,
        length=counted.length,
        partial=partial,
        unmatched=unmatched,
        notes=(*effective.notes, *_notes(modules, parameters, effective, settings, host)),
    )


def _unmatched_weights(model: nn.Module, excluded: tuple[str, ...], partial: bool) -> list[str]:
    missing = unmatched_exclusions(model, excluded)
    if missing and not partial:
        names = [name for name, parameter in model.named_parameters() if parameter.dim() == 2]
        raise PlanError(
            f"msamp/weight_wire_exclude: {missing[0]!r} matches no parameter of this model, so it would do nothing.\n"
            f"  Weights of this model: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}."
        )
    return [f"weight_wire_exclude: {pattern}" for pattern in missing]


def _pipeline_place(model: nn.Module) -> tuple[bool, bool, bool]:
    """(is one stage of a pipeline, holds the first layer, holds the last one), by DeepSpeed's public attributes."""
    stage, stages = getattr(model, "stage_id", None), getattr(model, "num_stages", None)
    if isinstance(stage, int) and isinstance(stages, int) and stages > 1:
        return True, stage == 0, stage == stages - 1
    return False, True, True


def _require_conversion(modules: tuple[ModuleDecision, ...], settings: Settings, partial: bool) -> None:
    """An opt-in that converts nothing is an error: the job would run, bill and report FP8 without any.

    FP8 products that `msamp` brings along were not asked for by name: its states are, and they convert any model.
    """
    if partial or settings.fp8.implied:
        return
    wanted = "Linear" if settings.fp8.layers.linear else "norm"
    if any(decision.is_swap and (decision.kind in MATRICES or wanted == "norm") for decision in modules):
        return
    seen = [decision for decision in modules if (decision.kind in MATRICES) == (wanted == "Linear")]
    if not seen:
        found = f"the model has no nn.{wanted if wanted == 'Linear' else 'LayerNorm or nn.RMSNorm'}"
    else:
        reasons = [f"{decision.fqn} ({decision.reason})" for decision in seen[:6]]
        more = f" and {len(seen) - 6} more" if len(seen) > 6 else ""
        kinds = " and ".join(dict.fromkeys(decision.kind for decision in seen))
        found = f"all {len(seen)} {kinds} are kept: {', '.join(reasons)}{more}"
    raise PlanError(
        f"fp8 is enabled, but nothing would compute in FP8: {found}.\n"
        "  Change fp8/layers or the model, or set fp8/enabled to false."
    )


def _keep_frozen(
    model: nn.Module, modules: tuple[ModuleDecision, ...], effective: Effective, settings: Settings, partial: bool
) -> Effective:
    """Name the layers whose frozen weights are kept in FP8 alone; refuse what cannot be kept so."""
    if settings.fp8.frozen_weights != "fp8":
        return effective
    recipe = effective.fp8.recipe
    why = None
    names = frozen_layers(model, modules, recipe)
    if not names and not partial and settings.trains:
        why = (
            "no FP8 Linear of this model has a frozen weight of its own that all its products use in FP8. Freeze the base "
            "before deepspeed.initialize, as peft.get_peft_model does"
        )
    if why:
        raise PlanError(f"fp8/frozen_weights fp8: {why}, or remove the key.")
    return replace(effective, fp8=replace(effective.fp8, frozen_weights=names))


def _optim(effective: Effective, settings: Settings) -> OptimPlan | None:
    if effective.level is None:
        return None
    facts = settings.deepspeed
    return OptimPlan(effective.level, facts.base_dtype, facts.zero_stage, facts.offload_optimizer)


def _brought_along(settings: Settings) -> bool:
    """O3's weight wire came with the level, and FP8 layers with `msamp`: neither was asked for by name."""
    return settings.fp8.implied and "weight_wire" not in settings.msamp.explicit


def _notes(
    modules: tuple[ModuleDecision, ...],
    parameters: tuple[ParameterDecision, ...],
    effective: Effective,
    settings: Settings,
    host: capabilities.Host,
) -> tuple[str, ...]:
    """What `msamp` brings by default and this model cannot use: reported, where an explicit wish would be refused; and
    which layers may lose."""
    notes = []
    if settings.fp8.implied and not any(decision.is_swap for decision in modules):
        notes.append("no layer computes in FP8 (see the kept ones): msamp works on states and gradients alone")
    level = effective.level
    if level is not None and level.weight_wire == "e4m3" and not any(p.weight_wire == "e4m3" for p in parameters):
        notes.append(f"{level.name}: no weight travels as FP8 values, none belongs to an FP8 layer; all go in 16 bits")
    apart = [decision for decision in modules if decision.is_swap and decision.kind in APART]
    if level is not None and level.weight_wire == "e4m3" and apart:
        kinds = " and ".join(dict.fromkeys(decision.kind for decision in apart))
        notes.append(f"{level.name}: the weights of {len(apart)} {kinds} compute in FP8 and travel in 16 bits")
    if effective.fp8.enabled and not effective.fp8.emulated:
        slower = performance.slower_note(host, effective.fp8.backend, effective.fp8.recipe.kind, modules)
        notes += [slower] if slower else []
    return tuple(notes)


def _comm(
    effective: Effective, parameters: tuple[ParameterDecision, ...], partial: bool, settings: Settings
) -> CommPlan | None:
    level = effective.level
    if level is None:
        return None
    fp8_weights = tuple(parameter.fqn for parameter in parameters if parameter.weight_wire == "e4m3")
    if level.weight_wire == "e4m3" and not fp8_weights and not partial and not _brought_along(settings):
        raise PlanError(
            f"{level.name} sends the weights of FP8 layers in quantized form, but no weight qualifies: "
            "each is frozen, shared with another module, used in high precision (override_linear_precision), or belongs to "
            "a Conv1D or to experts, whose weights travel in 16 bits.\n"
            "  Use opt_level O2."
        )
    return CommPlan(level.gradient_wire, level.gradient_wire_scope, level.weight_wire, level.block_size, fp8_weights)
