"""O3: the owner of a weight casts it exactly as the FP8 layer would, and only FP8 data is communicated.

An FP8 layer casts its 16-bit weight to E4M3 before it multiplies. Under ZeRO every rank does that to the same gathered
16-bit weight, W times the same work on bytes that had to travel twice as wide. The owner can do it once: same 16-bit
source (the high half of its master), same scale (the recipe's), hence the same quantized values, hence bit-equal
losses.

    delayed   scale from the history, which all ranks share; the new amax is exchanged for the history
    current   the amax first (MAX over the owners, a tensor may straddle partitions), then the cast
    block     the same with one amax per 128x128 tile

So one small MAX per step (a non-finite amax as inf: NCCL's MAX would lose a NaN), and no other new state. Parameters
that no FP8 layer owns travel in 16 bits as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ..comm.counters import all_reduce_bytes, counters
from ..errors import PlanError
from ..layers import ModelFp8State, QuantizedWeight
from ..layers.recipes import scaling_of
from ..layers.recipes.owner import Segment
from ..plan import Plan
from .touched import touched

TOUCHED = {
    "Engine": touched(reads="module"),
    "Parameter": touched(reads="ds_shape"),
}


@dataclass(eq=False)
class OwnedWeight:
    """A weight that an FP8 layer owns: `layer.quantized_weight` is where its quantized values belong."""

    name: str
    layer: Any
    param: Any
    shape: tuple[int, int]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


class WeightCaster:
    """Casts this rank's segments with the scales of the layers' recipe. Every method is collective over `group`."""

    def __init__(
        self, weights: Sequence[OwnedWeight], fp8_state: ModelFp8State, plan: Plan, group: Any, device: torch.device
    ):
        self.weights, self.fp8_state, self.group, self.device = list(weights), fp8_state, group, device
        self.scaling = scaling_of(plan.fp8.recipe.kind)
        self.index = {id(weight): number for number, weight in enumerate(self.weights)}
        self.counts = [self.scaling.owner_amaxes(weight.shape) for weight in self.weights]

    def cast(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Fill the segments' quantized values; returns scale_inv of every weight, in the shape its layer wants."""
        owners = [self.index[id(segment.weight)] for segment in segments]
        per_weight = self._exchange_amaxes(segments, owners)
        scales = self.scaling.owner_scales(self.weights, per_weight, self.fp8_state)
        self.scaling.owner_quantize(segments, [scales[owner] for owner in owners])
        return reciprocals(scales)

    def _exchange_amaxes(self, segments: Sequence[Segment], owners: Sequence[int]) -> list[Tensor]:
        """MAX over the owners of every tensor's or tile's amax, in one message."""
        amaxes = torch.zeros(sum(self.counts), dtype=torch.float32, device=self.device)
        per_weight = list(amaxes.split(self.counts))
        self.scaling.owner_measure(segments, owners, amaxes, per_weight)
        world_size = dist.get_world_size(group=self.group)
        if world_size > 1:
            dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=self.group)
            counters.add("scale", all_reduce_bytes(amaxes.numel(), 4, world_size))
        return per_weight


def reciprocals(scales: Sequence[Tensor]) -> list[Tensor]:
    """scale_inv of every weight; those of whole tensors by one launch, each at a multiple of 16 bytes, as cuBLASLt
    wants them.
    """
    if not scales or any(scale.dim() for scale in scales):
        return [torch.reciprocal(scale) for scale in scales]
    apart = torch.reciprocal(torch.stack(list(scales))).unsqueeze(1).expand(-1, 4).contiguous()
    return list(apart.select(1, 0).unbind(0))


def find_owned(module: torch.nn.Module, names: Sequence[str]) -> list[OwnedWeight]:
    """The layers of `module` that take quantized values for the parameters in `names`, in model order."""
    wanted, found = set(names), []
    for fqn, layer in module.named_modules():
        name = f"{fqn}.weight" if fqn else "weight"
        if name in wanted and hasattr(layer, "quantized_weight"):
            verify = getattr(layer, "verify_quantized", None)
            if verify is not None:
                verify()
            param = layer.weight
            shape = tuple(getattr(param, "ds_shape", param.shape))
            found.append(OwnedWeight(name, layer, param, shape))
    missing = wanted - {weight.name for weight in found}
    if missing:
        raise PlanError(
            f"msamp/weight_wire e4m3: {len(missing)} of {len(wanted)} weights of the plan have no FP8 layer that takes"
            f" quantized values, among them {min(missing)}.\n  Set weight_wire to none, or fp8/backend to torch."
        )
    return found


def set_quantized(weight: OwnedWeight, quantized: Tensor, scale_inv: Tensor) -> None:
    """Hand quantized (flat uint8) to the layer; it keeps a view, no copy."""
    weight.layer.quantized_weight = QuantizedWeight(quantized.view(torch.float8_e4m3fn).view(weight.shape), scale_inv)
    weight.layer.layer_state.quantized_weight_of = weight.param  # which need not be the layer's any more


def drop_quantized(weight: OwnedWeight) -> None:
    # Setting it makes the layer forget what it cached itself, so only when there is something to drop.
    if weight.layer.quantized_weight is not None:
        weight.layer.quantized_weight = None


def attach_weights(engine: Any, zero_optimizer: Any, plan: Plan, fp8_state: ModelFp8State) -> None:
    """Lay out stores for the weights of the plan; from the first step on their quantized values travel."""
    assert plan.comm is not None
    weights = find_owned(engine.module, plan.comm.fp8_weights)
    zero_optimizer.fp8_lay_out_weights(engine, weights, plan, fp8_state)
