"""FP8 gradients inside DeepSpeed: what every stage shares.

    stage 0, BF16_Optimizer, pipeline   engine.allreduce_bucket        -> comm.all_reduce    (wire_engine)
    stage 1, 2                          allreduce_and_scatter and kin  -> comm.reduce_cut    (wire_stage12)
    stage 3                             __avg_scatter_grads            -> comm.reduce_cut    (wire_stage3)

DeepSpeed's own ZeRO 1 and 2 all-reduce a whole bucket to every rank, although each rank keeps only the slices that it
owns. Here a slice goes to its owner and nowhere else. Norm, clipping and the overflow check come after the reduction
and so see the gradients that the optimizer will use.

The gradients of one step are handed on in fp32 where DeepSpeed accumulates in fp32, else in its 16-bit buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ..comm import Route, Wire, counters, flat_route, reduce_cut, two_level_routes
from ..comm.counters import all_reduce_bytes
from ..comm.cut import Cut
from ..comm.topology import choose_scope
from ..errors import PlanError
from ..layers import ModelFp8State
from ..plan import Plan
from .touched import touched

TOUCHED = {
    "AnyWrapper": touched(reads="dp_process_group"),
    "ZeroStage12": touched(reads="expert_dp_process_group"),
    "ZeroStage12 Bf16": touched(reads="real_dp_process_group"),
    "Engine": touched(
        reads=(
            "_config expert_data_parallel_group mpu seq_data_parallel_group zero_hpz_partition_size "
            "zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights"
        ),
    ),
}


@dataclass
class GradientWire:
    """How this job's gradients travel: the format, and the route of every data-parallel group."""

    wire: Wire
    routes: dict[Any, Route] = field(default_factory=dict)

    def route(self, group: Any) -> Route:
        """The route of `group`; groups met for the first time are flat."""
        if group not in self.routes:
            self.routes[group] = flat_route(group)
        return self.routes[group]


def make_gradient_wire(comm: Any, groups: Sequence[Any], *, node_name: str | None = None) -> GradientWire | None:
    """The gradient wire of this plan, or None when gradients stay with DeepSpeed. Collective for `inter_node`.

    comm       `Plan.comm`, or a `Level`: whatever has `gradient_wire` and `gradient_wire_scope`
    groups     every data-parallel group that this rank reduces over (experts have their own)
    node_name  what tells this node from others; the host name by default
    """
    if comm.gradient_wire == "none":
        return None
    result = GradientWire(Wire.named(comm.gradient_wire))
    if comm.gradient_wire_scope == "inter_node":
        distinct = list(dict.fromkeys(groups))
        result.routes = dict(zip(distinct, two_level_routes(distinct, node_name=node_name), strict=True))
    return result


def settle_scope(plan: Plan) -> Plan:
    """The plan with `gradient_wire_scope: auto` decided (see comm.topology); rank 0 says what and why. Collective."""
    comm = plan.comm
    if comm is None or comm.gradient_wire == "none" or comm.gradient_wire_scope != "auto":
        return plan
    scope, reason = choose_scope()
    if scope == "none":
        chosen, words = replace(comm, gradient_wire="none", gradient_wire_scope="all"), "DeepSpeed's own reduction"
    else:
        chosen, words = replace(comm, gradient_wire_scope=scope), f"{comm.gradient_wire}, {scope}"
    if dist.get_rank() == 0 and get_accelerator().device_name() == "cuda" and dist.get_world_size() > 1:
        print(f"ds_fp8: gradient_wire_scope auto: {words} ({reason})", flush=True)
    return replace(plan, comm=chosen)


def data_parallel_groups(engine: Any, zero_optimizer: Any | None = None) -> list[Any]:
    """Every group over which this engine reduces gradients, in an order that is equal on all ranks."""
    found = []
    if zero_optimizer is not None:
        found.append(getattr(zero_optimizer, "dp_process_group", None))
        found.extend(getattr(zero_optimizer, "real_dp_process_group", None) or [])
        experts = getattr(zero_optimizer, "expert_dp_process_group", None) or {}
        found.extend(experts[name] for name in sorted(experts))
    found.append(engine.seq_data_parallel_group)
    if engine.mpu is not None and hasattr(engine.mpu, "get_data_parallel_group"):
        found.append(engine.mpu.get_data_parallel_group())
    experts = getattr(engine, "expert_data_parallel_group", None) or {}
    found.extend(experts[name] for name in sorted(experts))
    return [group for group in dict.fromkeys(found) if group is not None]


def refuse_conflicts(zero_config: Any, comm: Any) -> None:
    """DeepSpeed's own quantized collectives and ours cannot both own the same bytes: say so before training."""
    if comm.gradient_wire != "none" and getattr(zero_config, "zero_quantized_gradients", False):
        raise PlanError(
            f"msamp/gradient_wire is {comm.gradient_wire} and zero_optimization/zero_quantized_gradients is true: both"
            " cast the same gradients, int4 (qgZ) on top of FP8.\n  Set zero_quantized_gradients to false, or"
            " gradient_wire to none."
        )
    if comm.weight_wire == "none":
        return
    for key, reason in (
        ("zero_quantized_weights", "both cast the gathered weights, int8 (qwZ) on top of FP8"),
        ("zero_quantized_nontrainable_weights", "it keeps its own int8 partitions, which hold no FP8 values"),
    ):
        if getattr(zero_config, key, False):
            raise PlanError(
                f"msamp/weight_wire is {comm.weight_wire} and zero_optimization/{key} is true: {reason}.\n"
                f"  Set {key} to false, or weight_wire to none."
            )
    if getattr(zero_config, "zero_hpz_partition_size", 1) > 1:
        raise PlanError(
            f"msamp/weight_wire is {comm.weight_wire} and zero_optimization/zero_hpz_partition_size is"
            f" {zero_config.zero_hpz_partition_size}: hpZ gathers from secondary 16-bit partitions inside the node,"
            " where quantized values would save nothing and need a third copy.\n"
            "  Set zero_hpz_partition_size to 1, or weight_wire to none."
        )


def reduce_bucket(
    bucket: Tensor,
    cut: Cut,
    gradient_wire: GradientWire,
    group: Any,
    *,
    average: float,
    out: Tensor | None = None,
    deliver: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Sum what each rank of `group` owns of a flat bucket, to the owner: into `out`, or to `deliver(start, part)` in
    fp32 and in order.

    How parameters are cut may differ between ranks; the sequence of elements of an owner may not. So blocks are counted
    through the whole sequence of an owner, and `start` is a position in it.
    """
    route = gradient_wire.route(group)
    numel = sum(cut.numels)
    counters.add("gradient", 0, all_reduce_bytes(numel, bucket.element_size(), route.world_size))
    reduce_cut(bucket, cut, route, wire=gradient_wire.wire, average=average, out=out, deliver=deliver)


def spread_over(targets: Sequence[Tensor], start: int, part: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Cut `part`, which begins at `start` of the targets laid end to end: (target number, offset in it, values)."""
    first = 0
    for number, target in enumerate(targets):
        begin, end = max(start, first), min(start + part.numel(), first + target.numel())
        if begin < end:
            yield number, begin - first, part[begin - start : end - start]
        first += target.numel()


def attach(engine: Any, zero_optimizer: Any, plan: Plan, fp8_state: ModelFp8State | None) -> None:
    """Give the specialised instance what its mixins need. Collective when routes or weights are laid out."""
    if plan.comm is None:
        return
    refuse_conflicts(engine._config.zero_config, plan.comm)
    gradient_wire = make_gradient_wire(plan.comm, data_parallel_groups(engine, zero_optimizer))
    if gradient_wire is not None:
        from . import wire_engine

        wire_engine.install(engine, gradient_wire)
        zero_optimizer.fp8_gradient_wire = gradient_wire
    if plan.comm.weight_wire != "none" and plan.comm.fp8_weights:
        from .weights import attach_weights

        assert fp8_state is not None, "weights that travel in FP8 belong to FP8 layers"
        attach_weights(engine, zero_optimizer, plan, fp8_state)
