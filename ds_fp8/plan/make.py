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
from ..config.refusal import Layer, ModelFacts
from ..config.refusals import refusals
from ..config.settings import Settings
from ..errors import PlanError
from . import expert_speed, performance
from .conversion_checks import MATRICES
from .decisions import CommPlan, ModuleDecision, OptimPlan, ParameterDecision, Plan
from .effective import Effective, decide_settings
from .flops import Counted, count_products
from .modules import Rules, decide_modules
from .parameters import decide_parameters, frozen_weights, unmatched_exclusions, with_scales_of_whole_experts


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
            measured=expert_speed.is_measured(host, effective.fp8.recipe.kind),
            weight_cache=effective.fp8.weight_cache,
            casts=settings.deepspeed.base_dtype != "fp32",
        )
        modules, unmatched = decide_modules(model, rules)
    facts = settings.deepspeed
    recipe = effective.fp8.recipe if effective.fp8.enabled else None
    excluded = settings.msamp.weight_wire_exclude
    moments = moments_of(facts.optimizer)
    parameters = decide_parameters(model, modules, recipe, effective.level, facts.base_dtype, excluded, moments)
    exclusions = unmatched_exclusions(model, excluded)
    frozen = frozen_weights(model, modules, effective.fp8.recipe)
    for refusal in refusals(settings, host, _facts(model, modules, parameters, effective, partial, exclusions, frozen)):
        raise PlanError(refusal.text)
    if settings.fp8.frozen_weights == "fp8" and effective.fp8.enabled:
        effective = replace(effective, fp8=replace(effective.fp8, frozen_weights=frozen))
    by_owner = {*effective.fp8.frozen_weights, *(one.fqn for one in parameters if one.weight_wire == "e4m3")}
    modules = with_scales_of_whole_experts(model, modules, by_owner)
    counted = count_products(model, modules) if effective.fp8.enabled else Counted((), (), 0)
    unmatched = (*unmatched, *(f"weight_wire_exclude: {pattern}" for pattern in exclusions))
    return Plan(
        modules=modules,
        parameters=parameters,
        fp8=effective.fp8,
        optim=_optim(effective, settings),
        comm=_comm(effective, parameters),
        zero_stage=facts.zero_stage,
        world_size=world_size,
        base_dtype=facts.base_dtype,
        device=str(host),
        products=counted.products,
        unknown=counted.unknown,
        unknown_macs=counted.unknown_macs,
        length=counted.length,
        partial=partial,
        unmatched=unmatched,
        notes=(*effective.notes, *_notes(modules, parameters, effective, settings, host)),
    )


def _facts(
    model: nn.Module,
    modules: tuple[ModuleDecision, ...],
    parameters: tuple[ParameterDecision, ...],
    effective: Effective,
    partial: bool,
    exclusions: list[str],
    frozen: tuple[str, ...],
) -> ModelFacts:
    """The model as the rules of `config/refusals.py` see it."""
    sends = effective.level is not None and effective.level.weight_wire == "e4m3"
    return ModelFacts(
        is_partial=partial,
        layers=tuple(
            Layer(one.fqn, one.kind, one.kind in MATRICES, "" if one.is_swap else one.reason) for one in modules
        ),
        frozen_weights=frozen,
        matrices=tuple(name for name, parameter in model.named_parameters() if parameter.dim() == 2),
        unmatched_exclusions=tuple(exclusions),
        fp8_weights=sum(one.weight_wire == "e4m3" for one in parameters) if sends else None,
    )


def _pipeline_place(model: nn.Module) -> tuple[bool, bool, bool]:
    """(is one stage of a pipeline, holds the first layer, holds the last one), by DeepSpeed's public attributes."""
    stage, stages = getattr(model, "stage_id", None), getattr(model, "num_stages", None)
    if isinstance(stage, int) and isinstance(stages, int) and stages > 1:
        return True, stage == 0, stage == stages - 1
    return False, True, True


def _optim(effective: Effective, settings: Settings) -> OptimPlan | None:
    if effective.level is None:
        return None
    facts = settings.deepspeed
    return OptimPlan(effective.level, facts.base_dtype, facts.zero_stage, facts.offload_optimizer)


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
        notes.append(f"{level.name}: {_sent_in_16_bits(effective, settings)}")
    if effective.fp8.enabled and not effective.fp8.emulated:
        fp8 = effective.fp8
        mode = None if fp8.compile is None else fp8.compile.mode
        slower = performance.slower_note(host, fp8.backend, fp8.recipe.kind, modules, mode)
        notes += [slower] if slower else []
    return tuple(notes)


def _sent_in_16_bits(effective: Effective, settings: Settings) -> str:
    """Why no trained weight travels as FP8 values."""
    if not effective.fp8.frozen_weights:
        return "no weight travels as FP8 values, none belongs to an FP8 layer; all go in 16 bits"
    base = "the frozen base travels in FP8" if settings.deepspeed.zero_stage == 3 else "the frozen base rests in FP8"
    return f"{base}; no trained weight belongs to an FP8 layer, and adapters go in 16 bits"


def _comm(effective: Effective, parameters: tuple[ParameterDecision, ...]) -> CommPlan | None:
    level = effective.level
    if level is None:
        return None
    fp8_weights = tuple(parameter.fqn for parameter in parameters if parameter.weight_wire == "e4m3")
    return CommPlan(level.gradient_wire, level.gradient_wire_scope, level.weight_wire, level.block_size, fp8_weights)
