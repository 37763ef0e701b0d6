"""The parameters of a job as `ds_fp8 estimate` counts them: so many of each kind, each kind at every level."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .. import config
from ..capabilities import Host
from ..config.settings import DeepSpeedFacts, Fp8Settings
from ..cost.job import Part
from ..cost.memory import Kept
from ..levels import ABSENT, LEVELS, Level

DEEPSPEED = Level("DeepSpeed", exp_avg="fp32", exp_avg_sq="fp32", master="fp32", gradient_wire="none")
"""DeepSpeed's mixed precision: fp32 states and master."""


@dataclass(frozen=True)
class Kind:
    """What decides about the bytes of a parameter; the default is the weight of an FP8 layer.

    is_frozen      it is not trained
    is_multiplied  an FP8 layer multiplies with it
    is_owned       its FP8 data can travel in its place (O3)
    is_fp8_alone   frozen, and kept as its FP8 data alone (`frozen_weights`)
    """

    is_frozen: bool = False
    is_multiplied: bool = True
    is_owned: bool = True
    is_fp8_alone: bool = False

    def at(self, level: Level, numel: int) -> Part:
        """`numel` parameters of this kind at a level."""
        if self.is_frozen:
            return Part(numel, Kept(ABSENT, ABSENT, ABSENT, False, False, self.is_multiplied, self.is_fp8_alone))
        weight_wire = level.weight_wire if self.is_owned else "none"
        ours = level.name != DEEPSPEED.name
        kept = Kept(level.exp_avg, level.exp_avg_sq, level.master, ours, weight_wire != "none", self.is_multiplied)
        return Part(numel, kept, level.gradient_wire, weight_wire, level.gradient_wire_scope)


def kinds_of(model: Any, settings: config.Settings, device: str, host: Host | None) -> tuple[dict[Kind, int], Any]:
    """(parameters of each kind, the plan): what the plan would do with each, whether the file has `fp8` or not.

    Raises PlanError as `make_plan` does.
    """
    from ..plan import make_plan
    from ..plan.estimate import is_fp8_alone, multiplied_layers
    from ..plan.parameters import decide_parameters

    if not settings.fp8.enabled:
        # Nothing of DeepSpeed's own sections can be in the way of a job that does not ask for FP8.
        facts = DeepSpeedFacts(zero_stage=1, base_dtype=settings.deepspeed.base_dtype)
        settings = config.Settings(Fp8Settings(enabled=True, implied=True), deepspeed=facts)
    plan = make_plan(model, settings, device=device, host=host)
    # O3's decisions say whose FP8 data can travel; in the plan only a job at O3 has them.
    excluded = settings.msamp.weight_wire_exclude
    parameters = decide_parameters(model, plan.modules, plan.fp8.recipe, LEVELS["O3"], plan.base_dtype, excluded)
    multiplied = multiplied_layers(plan)
    found: Counter[Kind] = Counter()
    for parameter in parameters:
        holder, _, name = parameter.fqn.rpartition(".")
        kind = Kind(
            parameter.frozen,
            holder in multiplied and (name == "weight" or len(parameter.shape) == 3),
            parameter.weight_wire != "none",
            is_fp8_alone(parameter, plan),
        )
        found[kind] += parameter.numel
    return dict(found), plan
