"""O3 in ZeRO 3: every gather of a weight for an FP8 product carries quantized values.

ZeRO 3 gathers each weight twice per micro-batch, in the forward and in the backward, and lets it go in between. The
owner's chunk of quantized values is made once per step and kept beside its 16-bit chunk; the gather that the
coordinator asks for (`all_gather_coalesced`) then fetches bytes, the layer gets them, and the parameter itself is
released: outside readers get decoded values (`weights_released`). All other gathers (GatheredParameters, checkpoints,
export: `param.all_gather`) fetch 16 bits as before.

Ranks whose gathers differ hang, or take each other's bytes for weights. So what a gather carries follows from steps,
loads and contexts, which all ranks share, and never from what one rank knows alone: its mode (train or eval, autograd
on or off), or a setter that it calls by itself. In eval mode layers compute with decoded values, as in ZeRO 1 and 2.

Small parameters that DeepSpeed keeps resident (`stage3_param_persistence_threshold`) are not gathered at all, and their
layers cast for themselves: the same quantized values.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import MultipleAllGatherHandles, ZeroParamStatus, free_param
from torch import Tensor

from ..comm.counters import all_gather_bytes, counters
from ..errors import PlanError
from ..layers import ModelFp8State
from ..layers.recipes.owner import Segment
from ..plan import Plan
from . import weights_released, weights_wrapped
from .touched import touched
from .weights import OwnedWeight, WeightCaster, drop_quantized, set_quantized
from .weights_asked import AskedTogether

PREFETCH = "_PartitionedParameterCoordinator__prefetch_bucket_sz"
"""Elements that DeepSpeed's coordinator gathers ahead. It counts elements whatever their size; quantized values are
half of them.
"""

if TYPE_CHECKING:
    from .states_stage3 import StatesStage3 as Base
else:
    Base = object

TOUCHED = {
    "Engine": touched(overrides="load_checkpoint load_module_state_dict", reads="module"),
    "Parameter": touched(
        overrides="all_gather all_gather_coalesced partition",
        reads="ds_id ds_numel ds_persist ds_process_group ds_status ds_summary ds_tensor nvme_swapper",
        writes="ds_status",
    ),
    "ZeroStage3": touched(overrides="reduce_ready_partitions_and_remove_grads step", reads="_get_param_coordinator"),
    "Coordinator": touched(writes="_PartitionedParameterCoordinator__prefetch_bucket_sz"),
}


class WeightChunk:
    """One partitioned weight: its chunk of quantized values on this rank, and the scale that goes with the whole.

    chunk  uint8, this rank's quantized values: a part of `message`, where the chunks of all weights lie in model order
    start  where it begins there
    """

    def __init__(self, weight: OwnedWeight, message: Tensor, start: int):
        self.weight, self.message, self.start = weight, message, start
        self.numel = weight.param.ds_tensor.ds_numel
        self.chunk = message[start : start + self.numel]
        self.scale_inv: Tensor | None = None
        self.dtype, self.device = weight.param.ds_tensor.dtype, torch.device(get_accelerator().current_device_name())
        self._segment: Segment | None = None
        self._segment_of = 0

    def segment(self) -> Segment | None:
        """The elements of this rank's chunk that are not padding."""
        param = self.weight.param
        if self._segment is not None and self._segment_of == param.ds_tensor.data_ptr():
            return self._segment
        start = dist.get_rank(group=param.ds_process_group) * param.ds_tensor.ds_numel
        numel = min(param.ds_tensor.ds_numel, param.ds_numel - start)
        if numel <= 0:
            return None
        source = param.ds_tensor.data[:numel].to(get_accelerator().current_device_name())
        found = Segment(self.weight, start, source, self.chunk[:numel])
        if source.data_ptr() == param.ds_tensor.data_ptr():  # not a copy of what lies on the host
            self._segment, self._segment_of = found, source.data_ptr()
        return found

    def arrive(self, gathered: Tensor) -> None:
        """The whole weight is here, with padding: the layer gets it, the Parameter is released."""
        weight = self.weight
        assert self.scale_inv is not None, "gathered before it was cast"
        set_quantized(weight, gathered[: weight.numel], self.scale_inv)
        source = weights_released.Source(weight.name, weight.holder.quantized_weight)
        weights_released.release(weight.param, self.dtype, self.device, weight.shape, source)
        weight.param.ds_status = ZeroParamStatus.AVAILABLE


class QuantizedHandle:
    """What the coordinator waits on: the bytes of some weights on their way, in the stream of the gathers."""

    def __init__(self, chunks: list[WeightChunk], group: Any):
        self.chunks = chunks
        self.world_size = dist.get_world_size(group=group)
        device = chunks[0].device
        own = own_message(chunks, device)
        self.handle: Any = None
        if self.world_size == 1:
            self.gathered = own
        else:
            self.gathered = torch.empty(self.world_size * own.numel(), dtype=torch.uint8, device=device)
            self.handle = dist.all_gather_into_tensor(self.gathered, own, group=group, async_op=True)
        sent = all_gather_bytes(own.numel(), self.world_size)
        counters.add("weight", sent, sent * chunks[0].dtype.itemsize)
        self.complete = False

    def wait(self, handle_dependency: bool = True) -> None:
        if self.complete:
            return
        if self.handle is not None:
            self.handle.wait()
        # By rank, then by weight: the parts of a weight that travelled alone lie in one piece already.
        rows = self.gathered.view(self.world_size, -1)
        wholes = [row.reshape(-1) for row in rows.split([one.numel for one in self.chunks], 1)]
        for one, whole in zip(self.chunks, wholes, strict=True):
            one.arrive(whole)
        self.complete = True


def let_go_of_quantized(weight: OwnedWeight) -> None:
    """Quantized values go. They lie in memory of the stream of the gathers, and products of this stream may still
    read them.
    """
    quantized = weight.holder.quantized_weight
    if quantized is None:
        return
    if not get_accelerator().is_synchronized_device():
        quantized.data.record_stream(get_accelerator().current_stream())
    drop_quantized(weight)


def own_message(chunks: list[WeightChunk], device: torch.device) -> Tensor:
    """This rank's chunks as they travel: a view where they follow each other in the model, as they mostly do."""
    first, last = chunks[0], chunks[-1]
    stop = last.start + last.numel
    together = all(one.message is first.message for one in chunks)
    if together and stop - first.start == sum(one.numel for one in chunks):
        return first.message[first.start : stop].to(device)
    return torch.cat([one.chunk for one in chunks]).to(device)


def lay_out_chunks(weights: list[OwnedWeight]) -> dict[int, WeightChunk]:
    """The chunks of all weights in one message for each process group and device, in the order in which DeepSpeed sorts
    what it gathers (`ds_id`), so that what is gathered together mostly lies together; by id of the parameter."""
    found: dict[int, WeightChunk] = {}
    by_place: dict[Any, list[OwnedWeight]] = {}
    for weight in sorted(weights, key=lambda weight: weight.param.ds_id):
        by_place.setdefault((weight.param.ds_process_group, weight.param.ds_tensor.device), []).append(weight)
    for (_, device), together in by_place.items():
        numel = sum(weight.param.ds_tensor.ds_numel for weight in together)
        message, start = torch.zeros(numel, dtype=torch.uint8, device=device), 0
        for weight in together:
            found[id(weight.param)] = WeightChunk(weight, message, start)
            start += weight.param.ds_tensor.ds_numel
    return found


class WeightsStage3(Base):
    """Mixin over `DeepSpeedZeroOptimizer_Stage3`: quantized values are made after each step and gathered when layers
    need them.
    """

    def fp8_lay_out_weights(
        self, engine: Any, weights: list[OwnedWeight], plan: Plan, fp8_state: ModelFp8State
    ) -> None:
        self.fp8_weight_plan, self.fp8_layers_state = plan, fp8_state
        weights_wrapped.begin(self)
        kept = [weight for weight in weights if not weight.param.ds_persist]
        for weight in kept:
            if weight.param.nvme_swapper is not None:
                raise PlanError(
                    "msamp/weight_wire is e4m3 and zero_optimization/offload_param/device is nvme: the partitions that"
                    " quantized values are made from are not in memory after a step.\n  Set weight_wire to none, or "
                    "offload parameters to cpu."
                )
        # Laid out with the first quantized values: until then gathers are 16-bit, and the job rests where O2 does.
        self.fp8_kept = kept
        self.fp8_chunks: dict[int, WeightChunk] = {}
        self.fp8_cast_event: Any = None
        every = [param for param in engine.module.parameters() if param.requires_grad and not param.ds_persist]
        of_quantized = sum(weight.numel for weight in kept)
        total = sum(param.ds_numel for param in every)
        coordinator = self._get_param_coordinator()
        ahead = getattr(coordinator, PREFETCH, 0)
        # As many bytes ahead as 16-bit gathers would be, counted by the elements that DeepSpeed counts.
        self.fp8_prefetch = (ahead, int(ahead * 2 * total / max(1, 2 * total - of_quantized)))
        self._fp8_set_fresh(False)
        by_group: dict[Any, list[OwnedWeight]] = {}
        for weight in kept:
            by_group.setdefault(weight.param.ds_process_group, []).append(weight)
        self.fp8_asked = AskedTogether(list(by_group.items()))
        device = torch.device(get_accelerator().current_device_name())
        self.fp8_casters = [
            WeightCaster(of_group, fp8_state, plan, group, device) for group, of_group in by_group.items()
        ]
        for name in ("load_checkpoint", "load_module_state_dict"):
            setattr(engine, name, self._fp8_forgetting(getattr(engine, name)))
        coordinator.fp8_let_go = self._fp8_let_go
        self._fp8_methods: list[tuple[Any, str, Any]] = []
        for param in engine.module.parameters():
            self._fp8_replace(param, "all_gather_coalesced", self._fp8_gather_instead(param.all_gather_coalesced))
            self._fp8_replace(param, "all_gather", self._fp8_bring_16bit(param, param.all_gather))
            self._fp8_replace(param, "partition", self._fp8_partition_instead(param, param.partition))

    def _fp8_set_fresh(self, fresh: bool) -> None:
        """Whether the next gathers of weights carry quantized values, and so how far ahead they may be."""
        self.fp8_quantized_fresh = fresh
        coordinator = self._get_param_coordinator()
        if hasattr(coordinator, PREFETCH):
            setattr(coordinator, PREFETCH, self.fp8_prefetch[fresh])

    def _fp8_replace(self, param: Any, name: str, method: Any) -> None:
        """DeepSpeed's methods of a parameter hang on the object; what was there is kept for the end."""
        self._fp8_methods.append((param, name, getattr(param, name)))
        setattr(param, name, method)

    def fp8_give_back(self) -> None:
        """The end of the engine: no quantized values in the layers, DeepSpeed's own methods on the parameters."""
        self._fp8_set_fresh(False)
        for chunk in self.fp8_chunks.values():
            drop_quantized(chunk.weight)
            if (
                weights_released.is_released(chunk.weight.param)
                and chunk.weight.param.ds_status == ZeroParamStatus.AVAILABLE
            ):
                chunk.weight.param.partition()  # between a forward and its backward
        for param, name, method in self._fp8_methods:
            setattr(param, name, method)
        self._get_param_coordinator().__dict__.pop("fp8_let_go", None)
        self._fp8_methods, self.fp8_chunks, self.fp8_casters, self.fp8_kept = [], {}, [], []
        weights_wrapped.end(self)

    def _fp8_forgetting(self, method: Any) -> Any:
        """A load replaces the weights that the quantized values stand for: 16-bit gathers until the next step."""

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._fp8_set_fresh(False)
            return method(*args, **kwargs)

        return wrapped

    def _fp8_gather_instead(self, original: Any) -> Any:
        def all_gather_coalesced(params: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Any:
            params = list(params)
            quantized = [p for p in params if id(p) in self.fp8_chunks] if self.fp8_quantized_fresh else []
            if not quantized:
                return original(params, safe_mode=safe_mode, quantize=quantize)
            chosen = {id(param) for param in quantized}
            others = [param for param in params if id(param) not in chosen]
            handles = [original(others, safe_mode=safe_mode, quantize=quantize)] if others else []
            if self.fp8_cast_event is not None:
                get_accelerator().current_stream().wait_event(self.fp8_cast_event)
            by_group: dict[Any, list[Any]] = {}
            for param in sorted(quantized, key=lambda p: p.ds_id):
                if param.ds_status != ZeroParamStatus.NOT_AVAILABLE:
                    raise RuntimeError(param.ds_summary())
                param.ds_status = ZeroParamStatus.INFLIGHT
                by_group.setdefault(param.ds_process_group, []).append(self.fp8_chunks[id(param)])
            handles.extend(QuantizedHandle(of_group, group) for group, of_group in by_group.items())
            return MultipleAllGatherHandles(handles)

        return all_gather_coalesced

    def _fp8_bring_16bit(self, param: Any, original: Any) -> Any:
        """GatheredParameters and its kind: 16 bits, also for a weight whose quantized values are here at this
        moment.
        """

        def all_gather(param_list: Any = None, *args: Any, **kwargs: Any) -> Any:
            for one in [param] if param_list is None else param_list:
                if weights_released.is_released(one):
                    weights_released.take_back(one)
                    one.ds_status = ZeroParamStatus.NOT_AVAILABLE
            return original(param_list, *args, **kwargs)

        return all_gather

    def _fp8_partition_instead(self, param: Any, original: Any) -> Any:
        """Quantized values go when the parameter goes. Values written in GatheredParameters make all of them stale."""

        def partition(param_list: Any = None, hierarchy: int = 0, has_been_updated: bool = False, **kwargs: Any) -> Any:
            listed = [param] if param_list is None else list(param_list)
            for one in listed:
                weights_released.take_back(one)
            result = original(param_list, hierarchy, has_been_updated, **kwargs)
            for one in listed:
                if id(one) in self.fp8_chunks:
                    let_go_of_quantized(self.fp8_chunks[id(one)].weight)
                    if has_been_updated:
                        self._fp8_set_fresh(False)
            return result

        return partition

    def _fp8_let_go(self, param: Any) -> None:
        """What `partition` does to a parameter that nobody has written (`hooks_stage3`)."""
        chunk = self.fp8_chunks.get(id(param))
        if chunk is None or not weights_released.is_released(param):
            free_param(param)
        else:
            weights_released.take_back(param)
            param.data = torch.empty(0, dtype=chunk.dtype, device=chunk.device)
            param.ds_status = ZeroParamStatus.NOT_AVAILABLE
        if chunk is not None:
            let_go_of_quantized(chunk.weight)

    def reduce_ready_partitions_and_remove_grads(self, param: Any) -> None:
        # DeepSpeed looks at a parameter many times here, and wants it as it is.
        with weights_released.raw():
            super().reduce_ready_partitions_and_remove_grads(param)

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.fp8_asked.moment += 1
        # Also after a skipped step: layers that cast for themselves would do it under a newer scale now.
        self.fp8_quantize_weights()

    def fp8_quantize_weights(self) -> None:
        """Cast this rank's chunks from its new 16-bit partitions; collective for the amaxes only."""
        fp8_state = self.fp8_layers_state
        if not self.fp8_casters:
            return
        self._fp8_set_fresh(fp8_state is not None and fp8_state.steps + 1 >= self.fp8_weight_plan.fp8.start_step)
        if not self.fp8_quantized_fresh:
            return
        if not self.fp8_chunks:
            self.fp8_chunks = lay_out_chunks(self.fp8_kept)
        for caster in self.fp8_casters:
            segments = [s for w in caster.weights if (s := self.fp8_chunks[id(w.param)].segment()) is not None]
            for weight, scale_inv in zip(caster.weights, caster.cast(segments), strict=True):
                self.fp8_chunks[id(weight.param)].scale_inv = scale_inv
        if not get_accelerator().is_synchronized_device():
            self.fp8_cast_event = get_accelerator().Event()
            self.fp8_cast_event.record()

    def _fp8_write_share(self, param: Any, share: Tensor, optim_state_key: str | None) -> None:
        """A setter of fp32 values, which DeepSpeed lets one rank call alone: from then on gathers are 16-bit, on all of
        them or on none.
        """
        if optim_state_key is None and self.fp8_quantized_fresh:
            self.fp8_asked.require_all("a setter of DeepSpeed's")
        super()._fp8_write_share(param, share, optim_state_key)

    def fp8_weights_changed(self) -> None:
        """New masters (a load, a setter): gathers are 16-bit until the next step."""
        self._fp8_set_fresh(False)
        changed = getattr(super(), "fp8_weights_changed", None)
        if changed is not None:
            changed()
