"""O3 in ZeRO 1 and 2: the two stores that take the place of a parameter group's flat 16-bit weights.

    quantized  1 byte for each element that an FP8 layer owns, in the flat's order; the layers hold views of it
    rest       16 bits for all others (norms, biases, embeddings, ...)

Both keep the flat's order, so the share of a rank is one range of each store: the owner casts and copies straight into
its range and the gather fills the others in place. Where everything lies is worked out once.

Before the first step nothing is released yet and the stores do not exist: the master is this rank's slice of the flat,
as at O2. With the first release it gets memory of its own, or keeps the flat's where it is the whole of it. Memory is
freed by dropping the reference: a view of 16-bit weights that somebody still holds keeps their values of that moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ..comm.counters import all_gather_bytes, counters
from ..comm.gather import all_gather_shares
from ..layers import ModelFp8State
from ..layers.recipes.owner import Segment
from ..plan import Plan
from . import weights_released
from .guards import put_in_again
from .touched import touched
from .weights import OwnedWeight, WeightCaster, drop_quantized, set_quantized

TOUCHED = {
    "Parameter": touched(reads="_hp_mapping"),
    "TensorFragment": touched(reads="lp_fragment_address", writes="lp_fragment"),
    "ZeroStage12": touched(
        reads=(
            "bit16_groups_flat parallel_partitioned_bit16_groups real_dp_process_group round_robin_bit16_groups "
            "round_robin_bit16_padding"
        ),
    ),
}

ALIGNMENT = 16
"""Elements to which each quantized weight is aligned: scaled_mm wants 16 bytes."""


class GroupStore:
    """Quantized values and rest of one parameter group.

    bounds       of each store by rank: rank r owns [bounds[r], bounds[r + 1])
    is_released  whether the 16-bit weights are away
    """

    def __init__(self, optimizer: Any, index: int, weights: list[OwnedWeight], fp8_state: ModelFp8State, plan: Plan):
        self.group = optimizer.real_dp_process_group[index]
        self.world_size, self.rank = dist.get_world_size(group=self.group), dist.get_rank(group=self.group)
        self.flat: Tensor = optimizer.bit16_groups_flat[index]
        self.partitions: list[Tensor] = optimizer.parallel_partitioned_bit16_groups[index]
        self.numel = self.flat.numel()
        self.partition_numel = self.numel // self.world_size
        self.first = self.rank * self.partition_numel
        self.is_released = False
        by_param = {id(weight.param): weight for weight in weights}
        self.fp8_weights: list[tuple[OwnedWeight, int, int]] = []
        self.rest: list[tuple[Any, int, int]] = []
        self.quantized_numel = self.rest_numel = 0
        for param, offset in flat_layout(optimizer, index):
            weight = by_param.get(id(param))
            if weight is not None:
                self.fp8_weights.append((weight, offset, self.quantized_numel))
                self.quantized_numel += -(-weight.numel // ALIGNMENT) * ALIGNMENT
            else:
                self.rest.append((param, offset, self.rest_numel))
                self.rest_numel += param.numel()
        spans = [(offset, weight.numel, at) for weight, offset, at in self.fp8_weights]
        self.quantized_bounds = share_bounds(spans, self.quantized_numel, self.partition_numel, self.world_size)
        spans = [(offset, param.numel(), at) for param, offset, at in self.rest]
        self.rest_bounds = share_bounds(spans, self.rest_numel, self.partition_numel, self.world_size)
        self.quantized = torch.zeros(0, dtype=torch.uint8, device=self.flat.device)
        self.others = torch.zeros(0, dtype=self.flat.dtype, device=self.flat.device)
        self.shapes = {id(param): param.shape for param, _, _ in self.rest}
        self.caster = WeightCaster(
            [weight for weight, _, _ in self.fp8_weights], fp8_state, plan, self.group, self.flat.device
        )
        self._laid_out_for: tuple[Any, ...] = ()
        self._segments: list[Segment] = []
        self._sources: list[Tensor] = []
        self._targets: list[Tensor] = []

    def refresh(self, own: Tensor) -> None:
        """After a step: `own` is this rank's new 16-bit partition; quantized values and rest go out, the flat's memory
        goes.
        """
        self._lay_out(own)
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)
        scale_inv = self.caster.cast(self._segments)
        all_gather_shares(self.quantized, self.quantized_bounds, self.group)
        all_gather_shares(self.others, self.rest_bounds, self.group)
        counters.add("weight", 0, all_gather_bytes(own.numel() * own.element_size(), self.world_size))
        for (weight, _, at), inverse in zip(self.fp8_weights, scale_inv, strict=True):
            set_quantized(weight, self.quantized[at : at + weight.numel], inverse)
        self.release()

    def _lay_out(self, own: Tensor) -> None:
        """Views of `own` and of the stores: made once, and again when the partition has moved."""
        place = (own.data_ptr(), own.dtype, own.device)
        if self._laid_out_for == place:
            return
        if self.quantized.numel() != self.quantized_numel or self.others.numel() != self.rest_numel:
            self.quantized = torch.zeros(self.quantized_numel, dtype=torch.uint8, device=self.flat.device)
            self.others = torch.zeros(self.rest_numel, dtype=self.flat.dtype, device=self.flat.device)
        self._segments, self._sources, self._targets = [], [], []
        for weight, offset, at in self.fp8_weights:
            for start, stop in self.own_part(offset, weight.numel):
                here = own[start + offset - self.first : stop + offset - self.first]
                self._segments.append(Segment(weight, start, here, self.quantized[at + start : at + stop]))
        for param, offset, at in self.rest:
            for start, stop in self.own_part(offset, param.numel()):
                self._sources.append(own[start + offset - self.first : stop + offset - self.first])
                self._targets.append(self.others[at + start : at + stop])
        self._laid_out_for = place

    def release(self) -> None:
        """Point parameters away from the flat and let go of its memory."""
        for weight, _, _ in self.fp8_weights:
            quantized = weight.holder.quantized_weight
            source = weights_released.Source(weight.name, quantized)
            weights_released.release(weight.param, self.others.dtype, self.others.device, weight.shape, source)
        if self.is_released:
            return
        for weight, _, _ in self.fp8_weights:
            put_in_again(weight.layer, weight.param)
        for param, _, at in self.rest:
            shape = self.shapes[id(param)]
            param.data = self.others[at : at + shape.numel()].view(shape)
        # DeepSpeed's map of fragments views the flat too, and would hold the whole of it.
        for param in (*(weight.param for weight, _, _ in self.fp8_weights), *(param for param, _, _ in self.rest)):
            mapping = getattr(param, "_hp_mapping", None)
            if mapping is not None:
                mapping.lp_fragment = self.others[:0]
        self.flat.data = self.flat.new_empty(0)
        for partition in self.partitions:
            partition.data = self.flat
        self.is_released = True

    def restore(self, own: Tensor) -> None:
        """Gather the 16-bit weights from the masters again. Quantized values stay: FP8 products go on using them."""
        if self.is_released:
            self.flat.data = self.flat.new_empty(self.numel)
            for partition, part in zip(self.partitions, self.flat.split(self.partition_numel), strict=True):
                partition.data = part
            self.is_released = False
        mine = self.flat[self.first : self.first + self.partition_numel]
        mine.copy_(own)
        if self.world_size > 1:
            dist.all_gather_into_tensor(self.flat, mine.clone(), group=self.group)
            counters.add("weight", all_gather_bytes(mine.numel() * mine.element_size(), self.world_size))
        for weight, offset, _ in self.fp8_weights:
            weights_released.take_back(weight.param)
            weight.param.data = self.flat[offset : offset + weight.numel].view(weight.shape)
            put_in_again(weight.layer, weight.param)
        for param, offset, _ in self.rest:
            shape = self.shapes[id(param)]
            param.data = self.flat[offset : offset + shape.numel()].view(shape)
        for param, offset in (
            *((weight.param, at) for weight, at, _ in self.fp8_weights),
            *((p, at) for p, at, _ in self.rest),
        ):
            mapping = getattr(param, "_hp_mapping", None)
            if mapping is not None:
                address = mapping.lp_fragment_address
                mapping.lp_fragment = self.flat.narrow(0, offset + address.start, address.numel)

    def settle(self) -> None:
        """Torch Parameters with decoded values, without asking the other ranks."""
        for weight, _, _ in self.fp8_weights:
            values = weights_released.values_of(weight.param)
            weights_released.take_back(weight.param)
            weight.param.data = values
            put_in_again(weight.layer, weight.param)
        self.is_released = False

    def forget_quantized(self) -> None:
        for weight, _, _ in self.fp8_weights:
            drop_quantized(weight)

    @property
    def has_quantized(self) -> bool:
        return bool(self.fp8_weights) and self.fp8_weights[0][0].holder.quantized_weight is not None

    def own_part(self, offset: int, numel: int) -> Iterator[tuple[int, int]]:
        """(start, stop) within the parameter that lie in this rank's partition; nothing if none do."""
        start = max(0, self.first - offset)
        stop = min(numel, self.first + self.partition_numel - offset)
        if start < stop:
            yield start, stop

    def keep_rest(self) -> None:
        """Values of the rest, written while the 16-bit weights were here."""
        for param, _, at in self.rest:
            self.others[at : at + param.numel()].copy_(param.data.view(-1))


def flat_layout(optimizer: Any, index: int) -> list[tuple[Any, int]]:
    """(parameter, first element) of every parameter in the flat of a group, in the flat's order."""
    params = optimizer.round_robin_bit16_groups[index]
    paddings = getattr(optimizer, "round_robin_bit16_padding", None)
    padding = paddings[index] if paddings else [0] * len(params)
    layout, offset = [], 0
    for param, after in zip(params, padding, strict=True):
        layout.append((param, offset))
        offset += param.numel() + after
    return layout


def share_bounds(spans: list[tuple[int, int, int]], total: int, partition_numel: int, world_size: int) -> list[int]:
    """Where in a store each rank's share begins, for tensors (offset in the flat, numel, offset in the store)."""
    bounds = []
    for rank in range(world_size):
        border = rank * partition_numel
        after = next(((offset, at) for offset, numel, at in spans if offset + numel > border), None)
        bounds.append(total if after is None else after[1] + max(0, border - after[0]))
    return [0, *bounds[1:], total]
