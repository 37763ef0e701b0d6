"""Settings and plan of an engine, and this rank's word about them: everything that is decided before the model is
touched.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..algorithms import ALGORITHMS, moments_of
from ..errors import DsFp8Error, PlanError
from ..zero.touched import touched
from .agreement import Finding
from .common_facts import common_facts
from .other_fp8 import refuse_other_fp8
from .printing import print_rank_0
from .source_file import source_name

if TYPE_CHECKING:
    from ..config.settings import Settings
    from ..plan import Plan

TOUCHED = {
    "Engine": touched(reads="client_optimizer config device mpu optimizer_name"),
    "PipelineEngine": touched(overrides="stage_id"),
}


def settings_of(engine: Any) -> Settings:
    """The validated JSON of an engine; ConfigError, and PrivateNameError for a DeepSpeed that differs from those we
    know.
    """
    from .. import config

    settings = config.load(engine.config, where=source_name(engine.config), trains=has_optimizer(engine))
    settings = _of_client(settings, engine.client_optimizer)
    if settings.enabled:
        from ..zero import private_names

        untested = private_names.verify(msamp=settings.msamp.enabled)
        if untested:
            print_rank_0(untested)
    return settings


def _of_client(settings: Settings, client: Any) -> Settings:
    """The settings with the algorithm of a client's optimizer, which the JSON cannot tell: the states that will be
    kept.
    """
    from ..optim import algorithm_of

    name = None if client is None or not settings.msamp.enabled else algorithm_of(client)
    if name is None:
        return settings
    moments = moments_of(name)
    if "exp_avg_sq" in settings.msamp.explicit - set(moments):
        raise PlanError(
            f"msamp/exp_avg_sq: {name} keeps no exp_avg_sq, so its format has no effect.\n  Remove the key."
        )
    assert settings.msamp.level is not None, "it is enabled"
    level = settings.msamp.level.keeping(moments)
    return replace(
        settings,
        msamp=replace(settings.msamp, level=level),
        deepspeed=replace(settings.deepspeed, optimizer=ALGORITHMS[name].label),
    )


def plan_of(engine: Any, model: Any, settings: Settings) -> Plan:
    """What will be done to the engine's model; PlanError."""
    from ..plan import make_plan

    if settings.fp8.enabled:
        refuse_other_fp8(model)
    return make_plan(model, settings, device=engine.device, world_size=_data_parallel_size(engine))


def has_optimizer(engine: Any) -> bool:
    """False for a frozen reference model, and for evaluation alone: neither JSON nor `initialize` names an
    optimizer.
    """
    return bool(engine.client_optimizer or engine.optimizer_name())


def _data_parallel_size(engine: Any) -> int:
    import deepspeed.comm as dist

    if engine.mpu is not None and hasattr(engine.mpu, "get_data_parallel_world_size"):
        return engine.mpu.get_data_parallel_world_size()
    return dist.get_world_size()


def finding_of(
    engine: Any, model: Any, settings: Settings | None, plan: Plan | None, error: DsFp8Error | None
) -> Finding:
    """This rank's word for `agree`. Stages of a pipeline hold different layers, and so make different plans."""
    stage = getattr(model, "stage_id", None)
    part = "" if stage is None else f"pipeline stage {stage}"
    facts = common_facts(engine)
    if plan is None or settings is None:
        return Finding(error=None if error is None else str(error), part=part, facts=facts)
    partial = plan.partial and settings.fp8.enabled
    layers = tuple(decision.fqn for decision in plan.modules) if plan.unmatched else ()
    return Finding(plan.digest(), None, part, partial, len(plan.swaps), plan.unmatched, layers, facts)
