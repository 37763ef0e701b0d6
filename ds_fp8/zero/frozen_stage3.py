"""`fp8.frozen_weights: "fp8"` in ZeRO 3: a rank's partition of a frozen weight is 1 byte per element, for ever.

The ranks cast their parts once, when the engine is built, with one scale for the whole weight (an amax over all
ranks), so the quantized weight is the one that ZeRO 0 to 2 keep (`frozen_weights.py`), to the bit. The 16-bit partition
is given up. Gathers for products carry the bytes as they lie (`gathers_stage3.py`): half of the traffic, and no cast in
any step, at O3 or without `msamp`.

DeepSpeed meets the partition, `param.ds_tensor`, as ever: it is a `ReleasedWeight` too. Whoever reads it, a checkpoint,
an export, GatheredParameters, gets 16-bit values that decode exactly; whoever writes gets 16-bit memory first. After
GatheredParameters with a `modifier_rank`, weights that have changed stay in 16 bits on all ranks, and their layers cast
them; all others are kept in FP8 as before. Weights below `stage3_param_persistence_threshold` are gathered like others:
a resident copy would be 16 bits on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from ..errors import PlanError
from ..layers import QuantizedWeight, holders_of
from ..layers.recipes.owner import Segment, decode_part
from ..plan import Plan
from . import weights_released, weights_wrapped
from .chunks_stage3 import WeightChunk, lay_out_chunks
from .gathers_stage3 import QuantizedGathers
from .portions import portions
from .touched import touched
from .weights import OwnedWeight, WeightCaster

TOUCHED = {
    "Engine": touched(reads="zero_hpz_partition_size zero_quantized_nontrainable_weights"),
    "Parameter": touched(
        reads=(
            "ds_numel ds_persist ds_process_group ds_quant_scale ds_secondary_tensor ds_shape ds_status ds_tensor "
            "nvme_swapper param_coordinator partition"
        ),
        writes="ds_persist",
    ),
    "ZeroStage3": touched(reads="persistent_parameters"),
}

MOST_NUMEL = 1 << 27
"""Elements of a rank that are cast together: they are there in 16 bits and in 8 at one moment, and lie in one
message.
"""


class GatheredFrozen(weights_released.Source):
    """The whole of a frozen weight, for as long as it is gathered."""

    because = "it is frozen and kept in FP8 (fp8/frozen_weights): this rank has its FP8 data for the moment"
    keep_16 = "keep frozen weights in 16 bits: fp8/frozen_weights high_precision"


class Partition(weights_released.Source):
    """This rank's part of a frozen weight: the values of `param.ds_tensor`, and the way back to 16 bits."""

    __slots__ = ("chunk", "thawed")

    def __init__(self, chunk: FrozenChunk):
        assert chunk.scale_inv is not None
        data = chunk.chunk.view(torch.float8_e4m3fn)
        super().__init__(chunk.weight.name, QuantizedWeight(data, chunk.scale_inv))
        self.chunk, self.thawed = chunk, False

    def values(self, dtype: torch.dtype) -> Tensor:
        """Flat, padding included, as DeepSpeed's partitions are."""
        scale_inv = self.quantized.scale_inv.to(self.quantized.data.device)
        values = torch.zeros(self.chunk.numel, dtype=dtype, device=self.quantized.data.device)
        shape, done, own = self.chunk.weight.shape, 0, self.chunk.own_numel
        matrix = shape[-2] * shape[-1]
        while done < own:  # a stack of experts matrix by matrix
            expert, start = divmod(self.chunk.first + done, matrix)
            stop = min(own, done + matrix - start)
            scale = scale_inv[expert] if len(shape) == 3 else scale_inv
            part = self.quantized.data[done:stop]
            values[done:stop] = decode_part(part, start, (shape[-2], shape[-1]), scale, dtype)
            done = stop
        return values

    def thaw(self, memory: Tensor | None = None) -> None:
        """Somebody writes to the partition, on all ranks: 16 bits, in `memory` or new, and so they stay."""
        if not self.thawed:
            self.chunk.owner.thaw_chunks([self.chunk], memory)


class FrozenChunk(WeightChunk):
    """A frozen weight: its chunk is all that this rank keeps."""

    source_class = GatheredFrozen
    owner: FrozenPartitions
    decoded: Partition

    def keep(self) -> None:
        """The 16-bit partition goes; readers get what the chunk decodes to."""
        share = self.weight.param.ds_tensor
        self.decoded = Partition(self)
        weights_released.release(share, self.dtype, share.device, (self.numel,), self.decoded)

    def give_16bit(self, memory: Tensor | None = None) -> None:
        """The partition in 16 bits; the chunk is still there."""
        share = self.weight.param.ds_tensor
        values = self.decoded.values(self.dtype) if memory is None else memory
        self.decoded.thawed = True
        weights_released.take_back(share)
        share.data = values


class FrozenPartitions:
    """The frozen weights of one engine in ZeRO 3.

    freeze  16 bits -> quantized values, of all that are not kept so already; collective
    thaw    quantized values -> 16 bits
    """

    fp8_cast_event: Any = None

    def __init__(self, model: nn.Module, plan: Plan, offload: Any):
        """`offload` is DeepSpeed's object with the hooks of ZeRO 3: of an optimizer its `parameter_offload`."""
        self.model, self.plan, self.names = model, plan, plan.fp8.frozen_weights
        self.offload = offload
        self.chunks: dict[int, FrozenChunk] = {}

    @torch.no_grad()
    def freeze(self) -> None:
        weights = [weight for weight in self._weights() if id(weight.param) not in self.chunks]
        refuse_others([weight.param for weight in weights])
        weights_wrapped.begin(self)
        self.gathers = QuantizedGathers.of(self.model, self.offload.param_coordinator)
        self._gather_all([weight.param for weight in weights])
        for part in portions(weights, lambda weight: weight.param.ds_tensor.ds_numel, MOST_NUMEL):
            chunks = self._cast(part)
            self.chunks |= chunks
            self.gathers.add(self, chunks)
        self.gathers.add(self, {})

    def _weights(self) -> Iterator[OwnedWeight]:
        for name in self.names:
            fqn, _, place = name.rpartition(".")
            layer = self.model.get_submodule(fqn)
            param: Any = getattr(layer, place)
            yield OwnedWeight(name, layer, param, tuple(param.ds_shape), holders_of(layer)[place])

    def _gather_all(self, params: list[Any]) -> None:
        """No weight of these is resident: they are gathered like large ones."""
        mine = {id(param) for param in params}
        for param in params:
            param.ds_persist = False
            if param.ds_status == ZeroParamStatus.AVAILABLE:
                param.partition()
        resident = self.offload.persistent_parameters
        resident[:] = [param for param in resident if id(param) not in mine]

    def _cast(self, weights: list[OwnedWeight]) -> dict[int, FrozenChunk]:
        """Cast on the accelerator; the chunks lie where the 16-bit partitions did. Collective."""
        device = torch.device(get_accelerator().current_device_name())
        found = lay_out_chunks(weights, self, FrozenChunk, device)
        by_group: dict[Any, list[OwnedWeight]] = {}
        for weight in weights:
            by_group.setdefault(weight.param.ds_process_group, []).append(weight)
        for group, of_group in by_group.items():
            segments = []
            for weight in of_group:
                chunk = found[id(weight.param)]
                if own := chunk.own_numel:
                    source = weight.param.ds_tensor.data[:own].to(device)
                    segments.append(Segment(weight, chunk.first, source, chunk.chunk[:own]))
            scales_inv = FrozenCaster(of_group, None, self.plan, group, device).cast(segments)
            for weight, scale_inv in zip(of_group, scales_inv, strict=True):
                found[id(weight.param)].scale_inv = scale_inv
        _move_to_partitions(list(found.values()))
        for one in found.values():
            one.keep()
        return found

    @torch.no_grad()
    def thaw(self) -> None:
        self.thaw_chunks(list(self.chunks.values()))
        if hasattr(self, "gathers"):
            self.gathers.remove(self)
        weights_wrapped.end(self)

    def thaw_chunks(self, chunks: Sequence[FrozenChunk], memory: Tensor | None = None) -> None:
        """16 bits for good; `memory` for a single one."""
        for one in chunks:
            if not one.decoded.thawed:
                one.give_16bit(memory)
            del self.chunks[id(one.weight.param)]
        self.gathers.drop(chunks)

    # -- as the owner of quantized values ------------------------------------------------------------------------------

    def fp8_wants_quantized(self) -> bool:
        return True

    def fp8_before_update(self, chunks: Sequence[Any]) -> None:
        for one in chunks:
            one.give_16bit()

    @torch.no_grad()
    def fp8_after_update(self, chunks: Sequence[Any]) -> None:
        """What is as it was goes back into FP8, if it is so on all ranks; collective."""
        by_group: dict[Any, list[FrozenChunk]] = {}
        for one in chunks:
            by_group.setdefault(one.weight.param.ds_process_group, []).append(one)
        changed: list[FrozenChunk] = []
        for group, of_group in by_group.items():
            differs = [not torch.equal(one.weight.param.ds_tensor, one.decoded.values(one.dtype)) for one in of_group]
            found = torch.tensor(differs, dtype=torch.int32, device=of_group[0].device)
            if dist.get_world_size(group=group) > 1:
                dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
            for one, is_changed in zip(of_group, found.tolist(), strict=True):
                if is_changed:
                    changed.append(one)
                else:
                    one.keep()
        if changed:
            self.thaw_chunks(changed)


class FrozenCaster(WeightCaster):
    """Scales that are powers of two, without a history."""

    def _single_scales(self, weights: Sequence[OwnedWeight], amaxes: Sequence[Tensor]) -> Sequence[Tensor]:
        return [self._of_matrix(*pair) for pair in zip(weights, amaxes, strict=True)]

    def _expert_scales(self, weight: OwnedWeight, amaxes: Tensor) -> Tensor:
        return torch.stack([self._of_matrix(weight, one) for one in amaxes])

    def _of_matrix(self, weight: OwnedWeight, amaxes: Tensor) -> Tensor:
        return self.scaling.frozen_scales(amaxes, (weight.shape[-2], weight.shape[-1]), self.recipe.forward_format)


def refuse_others(params: Iterable[Any]) -> None:
    """Raise PlanError where partitions are not plain 16-bit ones in memory."""
    for param in params:
        for found, key, value in (
            (param.nvme_swapper is not None, "offload_param/device", "nvme"),
            (hasattr(param.ds_tensor, "ds_quant_scale"), "zero_quantized_nontrainable_weights", "true"),
            (getattr(param, "ds_secondary_tensor", None) is not None, "zero_hpz_partition_size", "above 1"),
        ):
            if found:
                raise PlanError(
                    f"fp8/frozen_weights is fp8 and zero_optimization/{key} is {value}: DeepSpeed keeps another form of"
                    " the frozen weights of its own, beside which quantized values would save nothing.\n"
                    f"  Remove {key}, or frozen_weights."
                )


def _move_to_partitions(chunks: Sequence[FrozenChunk]) -> None:
    """Messages of partitions that lie on the host go there, pinned if those are."""
    moved: dict[tuple[int, Any], Tensor] = {}
    for one in chunks:
        share = one.weight.param.ds_tensor
        if share.device == one.message.device:
            continue
        place = (one.message.data_ptr(), share.device)
        if place not in moved:
            moved[place] = one.message.to(share.device)
            if share.is_pinned():
                moved[place] = get_accelerator().pin_memory(moved[place])
        one.message = moved[place]
        one.chunk = one.message[one.start : one.start + one.numel]
