"""Every `auto` decided, and every wish checked against the device: what will really run.

A value that the user wrote is obeyed or refused; a default that does not fit this job is replaced, and a note in the
banner says so (`MsampSettings.explicit` tells the two apart).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..capabilities import Host
from ..config.refusals import refusals
from ..config.settings import Fp8Settings, Settings
from ..errors import PlanError
from ..levels import Level
from ..recipe import OUR_RECIPES, RECIPE_KINDS, listed
from . import performance
from .decisions import Fp8Plan


@dataclass(frozen=True)
class Effective:
    """The job's settings after all decisions that need no model."""

    fp8: Fp8Plan
    level: Level | None
    notes: tuple[str, ...]


def decide_settings(settings: Settings, host: Host) -> Effective:
    """Raises PlanError when the device or DeepSpeed's sections cannot do what was asked for."""
    notes: list[str] = list(settings.notes)
    for refusal in refusals(settings, host):
        raise PlanError(refusal.text)
    fp8 = _decide_fp8(settings, host, notes) if settings.fp8.enabled else Fp8Plan()
    level = _decide_level(settings, notes) if settings.msamp.enabled else None
    return Effective(fp8, level, tuple(notes))


def _decide_fp8(settings: Settings, host: Host, notes: list[str]) -> Fp8Plan:
    asked = settings.fp8
    backend = _decide_backend(settings, host, notes)
    kind, facts = asked.recipe.kind, asked.recipe.facts
    needed = facts.transformer_engine_since
    if backend == "transformer_engine" and needed is not None and not host.at_least(needed):
        older = [
            name
            for name in OUR_RECIPES
            if (since := RECIPE_KINDS[name].transformer_engine_since) and host.at_least(since)
        ]
        raise PlanError(
            f"fp8/recipe {kind} in Transformer Engine needs compute capability {_dotted(needed)}, but this is {host}.\n"
            f"  Use {listed(older)}, or backend torch."
        )
    emulated = backend == "torch" and not host.at_least(facts.multiplied_since)
    if emulated and host.device_type == "cuda":
        notes.append(f"no FP8 matrix products on {host}: emulated exactly, slower than 16 bits")
    if not settings.trains:
        asked = _without_steps(asked, notes)
    return Fp8Plan(
        enabled=True,
        implied=asked.implied,
        backend=backend,
        recipe=asked.recipe,
        weight_cache=bool(asked.weight_cache),
        eval=bool(asked.eval),
        start_step=asked.start_step,
        min_features=asked.layers.min_features or 0,
        fuse=asked.fuse,
        compile=asked.compile,
        emulated=emulated,
    )


def _without_steps(asked: Fp8Settings, notes: list[str]) -> Fp8Settings:
    """An engine without an optimizer is read in eval mode, and has no steps in which scales could follow the amaxes.

    A reference model must round as the policy does that is trained by the same JSON (DPO's loss begins at ln 2), so it
    computes in FP8 in its only mode; each tensor's scale comes from its own amax, as a first step's does.
    """
    if asked.eval is None:
        notes.append(
            "this engine has no optimizer: FP8 in eval mode, so that a reference model rounds as the policy trained by "
            "this JSON does; fp8/eval false keeps it in high precision, true computes the policy's evaluation in FP8 "
            "too"
        )
    recipe = asked.recipe
    if instead := recipe.facts.without_history:
        notes.append(f"without optimizer steps scales do not follow amaxes: recipe {instead} instead of {recipe.kind}")
        recipe = replace(recipe, kind=instead)
    # Whoever writes a reference's weights (an average of the policy's) takes no step that would tell of it.
    cache = bool(asked.weight_cache)
    return replace(asked, recipe=recipe, weight_cache=cache, eval=asked.eval is not False, start_step=0)


def _decide_backend(settings: Settings, host: Host, notes: list[str]) -> str:
    asked, kind = settings.fp8.backend, settings.fp8.recipe.kind
    ours_alone = settings.fp8.recipe.facts.transformer_engine_since is None
    if asked == "torch" or ours_alone or settings.fp8.compile is not None:
        return "torch"
    fuses = settings.fp8.fuse  # only Transformer Engine joins norm and Linear
    if asked == "auto" and not fuses and performance.faster_backend(host, kind) == "torch":
        return "torch"
    if (why_not := host.why_no_transformer_engine) is None:
        return "transformer_engine"
    if asked == "transformer_engine":  # by msamp/use_te; else it was refused
        notes.append(
            f"msamp/use_te: Transformer Engine does not run here ({why_not}); backend torch has the same numerics"
        )
    return "torch"


def _decide_level(settings: Settings, notes: list[str]) -> Level:
    facts, explicit, level = settings.deepspeed, settings.msamp.explicit, settings.msamp.level
    assert level is not None, "an enabled msamp section has a level"
    if facts.base_dtype == "fp32" and level.master != "fp32":
        notes.append(f"msamp {level.name}: fp32 parameters are their own master, {level.master} does not apply")
        level = replace(level, master="fp32", rounding=level.rounding if "rounding" in explicit else "nearest")
    return level


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
