"""What a plan costs: bytes that a rank keeps and sends, summed over the parameters of a model (`ds_fp8.cost`)."""

from __future__ import annotations

from dataclasses import dataclass

from ..cost.job import Part, cost_of
from ..cost.memory import Bytes, Kept, Placement
from .conversion_checks import MATRICES
from .decisions import Fp8Plan, ParameterDecision, Plan


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank.

    device, host                 kept, by what they hold; the host's only with offload
    gradient_wire, weight_wire   sent in one optimizer step
    """

    zero_stage: int
    world_size: int
    device: Bytes
    host: Bytes
    gradient_wire_bytes: float
    weight_wire_bytes: float

    @property
    def resident_bytes(self) -> float:
        """On the device, gradients included, activations not."""
        return self.device.total

    @property
    def wire_bytes(self) -> float:
        return self.gradient_wire_bytes + self.weight_wire_bytes


def estimate(
    plan: Plan,
    *,
    zero_stage: int | None = None,
    world_size: int | None = None,
    micro_batches: int = 1,
    offload_optimizer: bool = False,
    offload_param: bool = False,
) -> Estimate:
    """The plan's cost, at another stage or world size if given.

    micro_batches  gradient accumulation steps: ZeRO 2 and 3 reduce, and ZeRO 3 gathers, in each of them
    offload_*      states, or the weights of ZeRO 3, lie on the host
    """
    where = Placement(
        plan.zero_stage if zero_stage is None else zero_stage,
        plan.world_size if world_size is None else world_size,
        plan.base_dtype,
        micro_batches,
        offload_optimizer,
        offload_param,
        cached_weight(plan.fp8),
    )
    multiplied = multiplied_layers(plan)
    cost = cost_of((_part(parameter, plan, multiplied) for parameter in plan.parameters), where)
    wires = cost.gradient_wire_bytes, cost.weight_wire_bytes
    return Estimate(where.zero_stage, where.world_size, cost.device, cost.host, *wires)


def cached_weight(fp8: Fp8Plan) -> int:
    """FP8 bytes that a layer keeps of each weight element between forwards (`weight_cache`).

    Hopper's products want the transpose for dgrad as well; Blackwell's, and emulated ones, do not.
    """
    if not (fp8.enabled and fp8.weight_cache):
        return 0
    high = any(fp8.recipe.override_linear_precision)
    return 2 if fp8.backend == "transformer_engine" or not (fp8.emulated or high) else 1


def multiplied_layers(plan: Plan) -> set[str]:
    """Names of the layers whose weights are operands of FP8 products: `weight`, or stacks of experts."""
    return {module.fqn for module in plan.swaps if module.kind in MATRICES}


def is_fp8_alone(parameter: ParameterDecision, plan: Plan) -> bool:
    """Whether the FP8 data of a frozen weight is all that is kept of it (`frozen_weights`)."""
    return parameter.fqn in plan.fp8.frozen_weights


def _part(parameter: ParameterDecision, plan: Plan, multiplied: set[str]) -> Part:
    holder, _, name = parameter.fqn.rpartition(".")
    kept = Kept(
        parameter.exp_avg,
        parameter.exp_avg_sq,
        parameter.master,
        ours=plan.optim is not None,
        fp8_weight=parameter.weight_wire == "e4m3",
        is_multiplied=holder in multiplied and (name == "weight" or len(parameter.shape) == 3),
        is_fp8_alone=is_fp8_alone(parameter, plan),
    )
    return Part(parameter.numel, kept, parameter.gradient_wire, parameter.weight_wire)
