"""What a plan costs: resident bytes per rank by ZeRO stage, bytes on the wire per step, share of FLOPs in FP8.

Per parameter, N parameters, W ranks (docs/numerics.md has the table):

    stage        0       1       2       3
    weights      all     all     all     1/W
    gradients    all     all     1/W     1/W
    states       all     1/W     1/W     1/W       (exp_avg, exp_avg_sq, master)

Activations are not counted: they depend on the batch. Under O3 the 16-bit half of the master is no longer the working
weight, so it is counted as sharded state.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..formats import BLOCK_SIZE, FORMATS
from ..levels import MASTER_EXTRA_BYTES, STATE_BYTES
from .decisions import ParameterDecision, Plan

WIRE_BYTES = {"e4m3": 1.0 + 4 / BLOCK_SIZE, "e5m2": 1.0 + 4 / BLOCK_SIZE}


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank.

    weights, gradients, master, states   resident
    codes                                FP8 copies of weights kept between micro-batches (`weight_cache`), and the
                                         transposes that a GPU's products want beside them
    gradient_wire, weight_wire           sent by one rank in one optimizer step
    """

    zero_stage: int
    world_size: int
    weights_bytes: float
    gradients_bytes: float
    master_bytes: float
    states_bytes: float
    codes_bytes: float
    gradient_wire_bytes: float
    weight_wire_bytes: float

    @property
    def resident_bytes(self) -> float:
        return self.weights_bytes + self.gradients_bytes + self.master_bytes + self.states_bytes + self.codes_bytes

    @property
    def wire_bytes(self) -> float:
        return self.gradient_wire_bytes + self.weight_wire_bytes


def estimate(
    plan: Plan, *, zero_stage: int | None = None, world_size: int | None = None, micro_batches: int = 1
) -> Estimate:
    """The plan's cost, at another stage or world size if given.

    micro_batches  gradient accumulation steps: ZeRO 2 and 3 reduce, and ZeRO 3 gathers, in each of them
    """
    stage = plan.zero_stage if zero_stage is None else zero_stage
    ranks = plan.world_size if world_size is None else world_size
    per_stage = {name: ranks if stage >= since else 1 for name, since in (("w", 3), ("g", 2), ("s", 1))}
    totals = dict.fromkeys(("weights", "gradients", "master", "states", "codes", "grad_wire", "weight_wire"), 0.0)
    for parameter in plan.parameters:
        size = FORMATS[parameter.dtype].bytes
        coded = parameter.weight_wire == "e4m3" and stage > 0
        totals["weights"] += parameter.numel * (1.0 if coded else size) / per_stage["w"]
        totals["weight_wire"] += parameter.numel * (1.0 if coded else size) * _weight_trips(stage, ranks, micro_batches)
        if parameter.frozen:
            continue
        totals["gradients"] += parameter.numel * size / per_stage["g"]
        totals["master"] += parameter.numel * _master_bytes(parameter, coded, plan) / per_stage["s"]
        totals["states"] += parameter.numel * _state_bytes(parameter) / per_stage["s"]
        wire = WIRE_BYTES.get(parameter.gradient_wire)
        totals["grad_wire"] += parameter.numel * (
            wire * _our_gradient_trips(stage, ranks, micro_batches)
            if wire is not None
            else size * _plain_gradient_trips(stage, ranks, micro_batches)
        )
    if plan.fp8.enabled and plan.fp8.weight_cache and stage < 3:
        owned = {parameter.owner for parameter in plan.parameters if parameter.weight_wire == "e4m3"}
        numels = {m.fqn: m.shape[0] * m.shape[1] for m in plan.swaps if m.kind in ("Linear", "Conv1D")}
        totals["codes"] = float(sum(numel for fqn, numel in numels.items() if fqn not in owned))
        if plan.fp8.backend == "transformer_engine" or _multiplies_codes(plan):
            # Hopper's products want the transpose for dgrad as well, of codes that travelled (O3) too; Blackwell's do not.
            totals["codes"] += sum(numels.values())
    return Estimate(stage, ranks, *totals.values())


def _multiplies_codes(plan: Plan) -> bool:
    """Whether our own layers multiply codes (`layers/cuda_products.py`) and do not decode them."""
    return not plan.fp8.emulated and not any(plan.fp8.recipe.override_linear_precision)


def _master_bytes(parameter: ParameterDecision, coded: bool, plan: Plan) -> float:
    if plan.base_dtype == "fp32":
        return 0.0
    own_half = 2.0 if coded and parameter.master.startswith("split") else 0.0
    return MASTER_EXTRA_BYTES[parameter.master] + own_half


def _state_bytes(parameter: ParameterDecision) -> float:
    return STATE_BYTES[parameter.exp_avg] + STATE_BYTES[parameter.exp_avg_sq]


def _weight_trips(stage: int, ranks: int, micro_batches: int) -> float:
    """How often a weight crosses the network per step: once after it (1, 2), for each forward and backward (3)."""
    share = (ranks - 1) / ranks
    return {0: 0.0, 1: share, 2: share, 3: 2 * micro_batches * share}[stage]


def _our_gradient_trips(stage: int, ranks: int, micro_batches: int) -> float:
    share = (ranks - 1) / ranks
    return {0: 2 * share, 1: share, 2: micro_batches * share, 3: micro_batches * share}[stage]


def _plain_gradient_trips(stage: int, ranks: int, micro_batches: int) -> float:
    """DeepSpeed's own: all-reduce of whole buckets in stages 0 to 2 (in 2 for each micro-batch), reduce-scatter in 3."""
    share = (ranks - 1) / ranks
    return {0: 2 * share, 1: 2 * share, 2: 2 * micro_batches * share, 3: micro_batches * share}[stage]
