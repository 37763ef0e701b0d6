"""O3: the owner of a weight casts it exactly as the FP8 layer would, and only FP8 data is communicated.

An FP8 layer casts its 16-bit weight to E4M3 before it multiplies. Under ZeRO every rank does that to the same gathered
16-bit weight, W times the same work on bytes that had to travel twice as wide. The owner can do it once: same 16-bit
source (the high half of its master), same scale (the recipe's), hence the same quantized values, hence bit-equal
losses.

    delayed   scale from the history, which all ranks share; the new amax is exchanged for the history
    current   the amax first (MAX over the owners, a tensor may straddle partitions), then the cast
    block     the same with one amax per 128x128 tile
    experts   each matrix of a stack by itself, as under current or block

So one small MAX per step (a non-finite amax as inf: NCCL's MAX would lose a NaN), and no other new state. Parameters
that no FP8 layer owns travel in 16 bits as ever.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ..comm.counters import all_reduce_bytes, counters
from ..errors import PlanError
from ..layers import ModelFp8State, QuantizedWeight, holders_of
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
    """A weight that an FP8 layer owns.

    layer   the module
    holder  `holder.quantized_weight` is where the quantized values belong: the layer, or the place of one stack of
            experts (`layers.experts_state.ExpertWeight`)
    shape   of the Parameter: two axes, or three with experts in front
    """

    name: str
    layer: Any
    param: Any
    shape: tuple[int, ...]
    holder: Any = None

    def __post_init__(self) -> None:
        self.holder = self.layer if self.holder is None else self.holder

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def matrices(self) -> int:
        """How many matrices have scales of their own."""
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass(frozen=True, eq=False)
class ExpertMatrix:
    """One expert's matrix of a stack, as a weight by itself."""

    shape: tuple[int, int]


class WeightCaster:
    """Casts this rank's segments with the scales of the layers' recipe. Every method is collective over `group`."""

    def __init__(self, weights: Sequence[OwnedWeight], fp8_state: Any, plan: Plan, group: Any, device: torch.device):
        self.weights, self.fp8_state, self.group, self.device = list(weights), fp8_state, group, device
        self.recipe = plan.fp8.recipe
        self.scaling = scaling_of(self.recipe.kind)
        self.first: dict[int, int] = {}
        """Number of a weight's first matrix."""
        self.counts: list[int] = []
        for weight in self.weights:
            self.first[id(weight)] = len(self.counts)
            self.counts += [self.scaling.owner_amaxes(_matrix_shape(weight))] * weight.matrices
        self._cuts: dict[tuple[int, int], tuple[Segment, list[Segment], list[int]]] = {}

    def cast(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Fill the segments' quantized values; returns scale_inv of every weight, in the shape its layer wants."""
        parts: list[Segment] = []
        owners: list[int] = []
        for segment in segments:
            of_matrices, numbers = self._of_matrices(segment)
            parts += of_matrices
            owners += numbers
        scales = self._scales(self._exchange_amaxes(parts, owners))
        of_each = [one for scale, weight in zip(scales, self.weights, strict=True) for one in _apart(scale, weight)]
        self.scaling.owner_quantize(parts, [of_each[owner] for owner in owners])
        return reciprocals(scales)

    def _of_matrices(self, segment: Segment) -> tuple[list[Segment], list[int]]:
        """A segment of a stack, cut where experts meet, and the number of each part's matrix; others as they are."""
        weight: OwnedWeight = segment.weight
        first = self.first[id(weight)]
        if len(weight.shape) == 2:
            return [segment], [first]
        known = self._cuts.get((first, segment.start))
        if known is None or known[0] is not segment:
            known = self._cuts[first, segment.start] = segment, *_cut(segment, first)
        return known[1], known[2]

    def _scales(self, per_matrix: Sequence[Tensor]) -> list[Tensor]:
        """Of every weight; with experts as first axis for a stack."""
        single = [weight for weight in self.weights if len(weight.shape) == 2]
        amaxes = [per_matrix[self.first[id(weight)]] for weight in single]
        found = {id(weight): scale for weight, scale in zip(single, self._single_scales(single, amaxes), strict=True)}
        for weight in self.weights:
            if len(weight.shape) == 3:
                first = self.first[id(weight)]
                of_experts = torch.stack(list(per_matrix[first : first + weight.matrices]))
                found[id(weight)] = self._expert_scales(weight, of_experts)
        return [found[id(weight)] for weight in self.weights]

    def _single_scales(self, weights: Sequence[OwnedWeight], amaxes: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.scaling.owner_scales(weights, amaxes, self.fp8_state) if weights else []

    def _expert_scales(self, weight: OwnedWeight, amaxes: Tensor) -> Tensor:
        return self.scaling.owner_expert_scales(_matrix_shape(weight), amaxes)

    def _exchange_amaxes(self, segments: Sequence[Segment], owners: Sequence[int]) -> list[Tensor]:
        """MAX over the owners of every matrix' or tile's amax, in one message."""
        amaxes = torch.zeros(sum(self.counts), dtype=torch.float32, device=self.device)
        per_matrix = list(amaxes.split(self.counts))
        self.scaling.owner_measure(segments, owners, amaxes, per_matrix)
        world_size = dist.get_world_size(group=self.group)
        if world_size > 1:
            dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=self.group)
            counters.add("scale", all_reduce_bytes(amaxes.numel(), 4, world_size))
        return per_matrix


def _matrix_shape(weight: OwnedWeight) -> tuple[int, int]:
    return weight.shape[-2], weight.shape[-1]


def _apart(scale: Tensor, weight: OwnedWeight) -> Sequence[Tensor]:
    return scale.unbind() if len(weight.shape) == 3 else [scale]


def _cut(segment: Segment, first: int) -> tuple[list[Segment], list[int]]:
    """See `WeightCaster._of_matrices`."""
    parts, numbers, done = [], [], 0
    shape = _matrix_shape(segment.weight)
    numel, total = shape[0] * shape[1], segment.source.numel()
    while done < total:
        expert, start = divmod(segment.start + done, numel)
        stop = min(total, done + numel - start)
        values = segment.source[done:stop], segment.quantized[done:stop]
        parts.append(Segment(ExpertMatrix(shape), start, *values))
        numbers.append(first + expert)
        done = stop
    return parts, numbers


def reciprocals(scales: Sequence[Tensor]) -> list[Tensor]:
    """scale_inv of every weight; those of whole tensors by one launch, each at a multiple of 16 bytes, as cuBLASLt
    wants them.
    """
    found = {place: torch.reciprocal(scale) for place, scale in enumerate(scales) if scale.dim()}
    whole = [place for place, scale in enumerate(scales) if not scale.dim()]
    if whole:
        apart = torch.reciprocal(torch.stack([scales[place] for place in whole])).unsqueeze(1).expand(-1, 4)
        found.update(zip(whole, apart.contiguous().select(1, 0).unbind(0), strict=True))
    return [found[place] for place in range(len(scales))]


def find_owned(module: torch.nn.Module, names: Sequence[str]) -> list[OwnedWeight]:
    """The layers of `module` that take quantized values for the parameters in `names`, in model order."""
    wanted, found = set(names), []
    for fqn, layer in module.named_modules():
        for place, holder in holders_of(layer).items():
            name = f"{fqn}.{place}" if fqn else place
            if name in wanted:
                verify = getattr(layer, "verify_quantized", None)
                if verify is not None:
                    verify()
                param = getattr(layer, place)
                shape = tuple(getattr(param, "ds_shape", param.shape))
                found.append(OwnedWeight(name, layer, param, shape, holder))
    missing = wanted - {weight.name for weight in found}
    if missing:
        raise PlanError(
            f"msamp/weight_wire e4m3: {len(missing)} of {len(wanted)} weights of the plan have no FP8 layer that takes"
            f" quantized values, among them {min(missing)}.\n  Set weight_wire to none, or fp8/backend to torch."
        )
    return found


def set_quantized(weight: OwnedWeight, quantized: Tensor, scale_inv: Tensor) -> None:
    """Hand quantized (flat uint8) to the layer; it keeps a view, no copy."""
    weight.holder.quantized_weight = QuantizedWeight(quantized.view(torch.float8_e4m3fn).view(weight.shape), scale_inv)
    weight.holder.layer_state.quantized_weight_of = weight.param  # which need not be the layer's any more


def drop_quantized(weight: OwnedWeight) -> None:
    # Setting it makes the layer forget what it cached itself, so only when there is something to drop.
    if weight.holder.quantized_weight is not None:
        weight.holder.quantized_weight = None


def attach_weights(engine: Any, zero_optimizer: Any, plan: Plan, fp8_state: ModelFp8State) -> None:
    """Lay out stores for the weights of the plan; from the first step on their quantized values travel."""
    assert plan.comm is not None
    weights = find_owned(engine.module, plan.comm.fp8_weights)
    zero_optimizer.fp8_lay_out_weights(engine, weights, plan, fp8_state)
