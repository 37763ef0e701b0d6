"""ZeRO 3: chunks of quantized weights, and the messages in which they travel.

A rank holds of each weight a chunk, 1 byte per element, beside or in the place of its 16-bit partition. What is
gathered together is a `Message`: laid out once, used again in every step, and taken apart by one copy when it has
arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor

from ..comm.counters import all_gather_bytes, counters
from . import weights_released
from .touched import touched
from .weights import OwnedWeight, drop_quantized, set_quantized

TOUCHED = {
    "Parameter": touched(
        reads="ds_id ds_numel ds_process_group ds_status ds_summary ds_tensor",
        writes="ds_status",
    ),
}


class Owner(Protocol):
    """Who makes the quantized values of some weights.

    fp8_cast_event  what a gather has to wait for; None for nothing
    """

    fp8_cast_event: Any

    def fp8_wants_quantized(self) -> bool:
        """Whether a gather that begins now carries quantized values."""

    def fp8_before_update(self, chunks: Sequence[WeightChunk]) -> None:
        """16-bit partitions of these weights are about to be written, on all ranks."""

    def fp8_after_update(self, chunks: Sequence[WeightChunk]) -> None:
        """They are."""


class WeightChunk:
    """One partitioned weight: its chunk of quantized values on this rank, and the scale that goes with the whole.

    message    uint8, where the chunks of several weights lie in model order
    start      where this one begins there
    first      where this rank's part begins in the flattened weight
    own_numel  elements of the chunk that are not padding
    """

    source_class: type[weights_released.Source] = weights_released.Source

    def __init__(self, weight: OwnedWeight, owner: Owner, message: Tensor, start: int):
        self.weight, self.owner, self.message, self.start = weight, owner, message, start
        self.numel = weight.param.ds_tensor.ds_numel
        self.first = dist.get_rank(group=weight.param.ds_process_group) * self.numel
        self.own_numel = max(0, min(self.numel, weight.param.ds_numel - self.first))
        self.chunk = message[start : start + self.numel]
        self.scale_inv: Tensor | None = None
        self.dtype, self.device = weight.param.ds_tensor.dtype, torch.device(get_accelerator().current_device_name())

    def arrive(self, gathered: Tensor) -> None:
        """The whole weight is here, with padding: the layer gets it, the Parameter is released."""
        weight = self.weight
        assert self.scale_inv is not None, "gathered before it was cast"
        set_quantized(weight, gathered[: weight.numel], self.scale_inv)
        source = self.source_class(weight.name, weight.holder.quantized_weight)
        weights_released.release(weight.param, self.dtype, self.device, weight.shape, source)
        weight.param.ds_status = ZeroParamStatus.AVAILABLE

    def let_go(self) -> None:
        """The quantized weight goes. It lies in memory of the stream of the gathers, and products of this stream may
        still read it.
        """
        quantized = self.weight.holder.quantized_weight
        if quantized is None:
            return
        if not get_accelerator().is_synchronized_device():
            quantized.data.record_stream(get_accelerator().current_stream())
        drop_quantized(self.weight)


Kind = TypeVar("Kind", bound=WeightChunk)


class Message:
    """Chunks of one process group that travel together, and where they lie: made once for each such set.

    own  this rank's chunks, a view, where they follow each other in one message, as they mostly do; else None
    """

    def __init__(self, chunks: list[WeightChunk], group: Any):
        self.chunks, self.group = chunks, group
        self.world_size = dist.get_world_size(group=group)
        self.device = chunks[0].device
        self.numels = [one.numel for one in chunks]
        self.numel = sum(self.numels)
        first, last = chunks[0], chunks[-1]
        stop = last.start + last.numel
        together = all(one.message is first.message for one in chunks) and stop - first.start == self.numel
        self.own = first.message[first.start : stop] if together else None
        self.sent = all_gather_bytes(self.numel, self.world_size)
        self.events = list({id(one.owner): one.owner for one in chunks}.values())

    def begin(self) -> QuantizedHandle:
        for owner in self.events:
            if owner.fp8_cast_event is not None:
                get_accelerator().current_stream().wait_event(owner.fp8_cast_event)
        for one in self.chunks:
            param = one.weight.param
            if param.ds_status != ZeroParamStatus.NOT_AVAILABLE:
                raise RuntimeError(param.ds_summary())
            param.ds_status = ZeroParamStatus.INFLIGHT
        return QuantizedHandle(self)

    def parts(self, gathered: Tensor) -> Sequence[Tensor]:
        """The weights in what has arrived, which lies there by rank, then by weight: one copy for all of them."""
        if len(self.numels) == 1:
            return (gathered,)
        if self.world_size == 1:
            return gathered.split(self.numels)
        rows = gathered.view(self.world_size, self.numel)
        wholes = [rows.new_empty(self.world_size * numel) for numel in self.numels]
        torch.split_with_sizes_copy(
            rows,
            self.numels,
            1,
            out=[whole.view(self.world_size, numel) for whole, numel in zip(wholes, self.numels, strict=True)],
        )
        return wholes


class QuantizedHandle:
    """What the coordinator waits on: a message on its way, in the stream of the gathers."""

    def __init__(self, message: Message):
        self.message = message
        own = torch.cat([one.chunk for one in message.chunks]) if message.own is None else message.own
        own = own.to(message.device)
        self.handle: Any = None
        if message.world_size == 1:
            self.gathered = own
        else:
            self.gathered = own.new_empty(message.world_size * message.numel)
            self.handle = dist.all_gather_into_tensor(self.gathered, own, group=message.group, async_op=True)
        counters.add("weight", message.sent, message.sent * message.chunks[0].dtype.itemsize)
        self.complete = False

    def wait(self, handle_dependency: bool = True) -> None:
        if self.complete:
            return
        if self.handle is not None:
            self.handle.wait()
        for one, whole in zip(self.message.chunks, self.message.parts(self.gathered), strict=True):
            one.arrive(whole)
        self.complete = True


def lay_out_chunks(
    weights: Iterable[OwnedWeight], owner: Owner, chunk_class: type[Kind], device: torch.device | None = None
) -> dict[int, Kind]:
    """The chunks of all weights in one message for each process group and device, in the order in which DeepSpeed sorts
    what it gathers (`ds_id`), so that what is gathered together mostly lies together; by id of the parameter.

    device  where they lie; None for where the 16-bit partitions do
    """
    found: dict[int, Kind] = {}
    by_place: dict[Any, list[OwnedWeight]] = {}
    for weight in sorted(weights, key=lambda weight: weight.param.ds_id):
        place = weight.param.ds_tensor.device if device is None else device
        by_place.setdefault((weight.param.ds_process_group, place), []).append(weight)
    for (_, place), together in by_place.items():
        numel = sum(weight.param.ds_tensor.ds_numel for weight in together)
        message, start = torch.zeros(numel, dtype=torch.uint8, device=place), 0
        for weight in together:
            found[id(weight.param)] = chunk_class(weight, owner, message, start)
            start += weight.param.ds_tensor.ds_numel
    return found
