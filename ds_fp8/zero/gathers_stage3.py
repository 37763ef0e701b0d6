"""ZeRO 3's gathers with quantized values in the place of 16 bits: what travels, and what a parameter is meanwhile.

The coordinator gathers what the next modules need (`all_gather_coalesced`). For weights whose FP8 layers take quantized
values it gets them here: each rank sends its chunk, 1 byte per element, the layer gets the whole, and the Parameter is
released: outside readers get decoded values (`weights_released`). All other gathers (GatheredParameters, checkpoints,
export: `param.all_gather`) fetch 16 bits as ever.

Whose weights these are, and when, owners know: O3 (`weights_stage3.py`), and frozen weights that are kept in FP8 alone
(`frozen_stage3.py`). What travels together is laid out once, and found again by the parameters that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import MultipleAllGatherHandles, ZeroParamStatus, free_param

from . import weights_released
from .chunks_stage3 import Message, Owner, WeightChunk
from .touched import touched
from .weights import drop_quantized

PREFETCH = "_PartitionedParameterCoordinator__prefetch_bucket_sz"
"""Elements that DeepSpeed's coordinator gathers ahead. It counts elements whatever their size; quantized values are
half of them.
"""

GATHERS = "fp8_gathers"
"""Attribute of a coordinator: the `QuantizedGathers` of its engine."""

MOST_MESSAGES = 4096
"""Layouts that are kept: a trained model asks for the same few hundred in every step."""

TOUCHED = {
    "Parameter": touched(
        overrides="all_gather all_gather_coalesced partition",
        reads="ds_id ds_numel ds_persist ds_process_group ds_status",
        writes="ds_status",
    ),
    "Coordinator": touched(writes="_PartitionedParameterCoordinator__prefetch_bucket_sz"),
}


class QuantizedGathers:
    """DeepSpeed's methods on the parameters of one engine, with quantized values where an owner has them.

    chunks  by id of the parameter
    """

    def __init__(self, module: torch.nn.Module, coordinator: Any):
        self.module, self.coordinator = module, coordinator
        self.chunks: dict[int, WeightChunk] = {}
        self._owners: list[Owner] = []
        self._ready: tuple[Owner, ...] = ()
        self._messages: dict[tuple[int, ...], tuple[list[Any], list[Message]]] = {}
        self._ahead = getattr(coordinator, PREFETCH, 0)
        params: list[Any] = list(module.parameters())
        self._total = sum(param.ds_numel for param in params if not param.ds_persist)
        self._methods: list[tuple[Any, str, Any]] = []
        for param in params:
            self._replace(param, "all_gather_coalesced", self._gather_instead(param.all_gather_coalesced))
            self._replace(param, "all_gather", self._bring_16bit(param, param.all_gather))
            self._replace(param, "partition", self._partition_instead(param, param.partition))
        coordinator.fp8_let_go = self._let_go

    @classmethod
    def of(cls, module: torch.nn.Module, coordinator: Any) -> QuantizedGathers:
        """Those of this engine; made for the first owner."""
        found: QuantizedGathers | None = coordinator.__dict__.get(GATHERS)
        if found is None:
            found = coordinator.__dict__[GATHERS] = cls(module, coordinator)
        return found

    def _replace(self, param: Any, name: str, method: Any) -> None:
        """DeepSpeed's methods of a parameter hang on the object; what was there is kept for the end."""
        self._methods.append((param, name, getattr(param, name)))
        setattr(param, name, method)

    def add(self, owner: Owner, chunks: Mapping[int, WeightChunk]) -> None:
        """These weights travel as quantized values whenever `owner` wants it."""
        self.chunks.update(chunks)
        if owner not in self._owners:
            self._owners.append(owner)
        self._messages.clear()
        self.look()

    def drop(self, chunks: Iterable[WeightChunk]) -> None:
        """These weights travel in 16 bits from now on."""
        for one in list(chunks):
            drop_quantized(one.weight)
            param = one.weight.param
            if weights_released.is_released(param) and param.ds_status == ZeroParamStatus.AVAILABLE:
                param.partition()  # between a forward and its backward
            del self.chunks[id(param)]
        self._messages.clear()
        self.look()

    def remove(self, owner: Owner) -> None:
        """An owner ends. With the last one DeepSpeed's own methods come back."""
        self.drop([one for one in self.chunks.values() if one.owner is owner])
        self._owners = [one for one in self._owners if one is not owner]
        if self._owners or not self._methods:
            return
        for param, name, method in self._methods:
            setattr(param, name, method)
        self._methods = []
        for name in (GATHERS, "fp8_let_go", "fp8_ahead"):
            self.coordinator.__dict__.pop(name, None)

    def look(self) -> None:
        """How far ahead the next gathers may be: as many bytes as 16-bit ones would be.

        Our coordinator counts them; DeepSpeed's counts elements, and gets as many as make those bytes on average.
        """
        if not hasattr(self.coordinator, PREFETCH):
            return
        ready = {id(owner) for owner in self._owners if owner.fp8_wants_quantized()}
        quantized = [one.weight for one in self.chunks.values() if id(one.owner) in ready]
        numel = sum(weight.numel for weight in quantized)
        whole = max(1, 2 * self._total - numel)
        setattr(self.coordinator, PREFETCH, int(self._ahead * 2 * self._total / whole) if numel else self._ahead)
        self.coordinator.fp8_ahead = self._ahead, frozenset(id(weight.param) for weight in quantized)

    # -- DeepSpeed's methods of a parameter --------------------------------------------------------------------------

    def _gather_instead(self, original: Any) -> Any:
        def all_gather_coalesced(params: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Any:
            params = list(params)
            ready = tuple(owner for owner in self._owners if owner.fp8_wants_quantized())
            if not ready:
                return original(params, safe_mode=safe_mode, quantize=quantize)
            others, messages = self._laid_out(params, ready)
            if not messages:
                return original(params, safe_mode=safe_mode, quantize=quantize)
            handles = [original(others, safe_mode=safe_mode, quantize=quantize)] if others else []
            handles.extend([message.begin() for message in messages])
            return handles[0] if len(handles) == 1 else MultipleAllGatherHandles(handles)

        return all_gather_coalesced

    def _laid_out(self, params: list[Any], ready: tuple[Owner, ...]) -> tuple[list[Any], list[Message]]:
        """What of these parameters travels in 16 bits, and the messages of the others."""
        if ready != self._ready or len(self._messages) > MOST_MESSAGES:
            self._messages.clear()
            self._ready = ready
        key = tuple(map(id, params))
        found = self._messages.get(key)
        if found is None:
            others: list[Any] = []
            by_group: dict[Any, list[WeightChunk]] = {}
            for param in sorted(params, key=lambda param: param.ds_id):
                chunk = self.chunks.get(id(param))
                if chunk is None or chunk.owner not in ready:
                    others.append(param)
                else:
                    by_group.setdefault(param.ds_process_group, []).append(chunk)
            found = others, [Message(chunks, group) for group, chunks in by_group.items()]
            self._messages[key] = found
        return found

    def _bring_16bit(self, param: Any, original: Any) -> Any:
        """GatheredParameters and its kind: 16 bits, also for a weight whose quantized values are here at this
        moment.
        """

        def all_gather(param_list: Any = None, *args: Any, **kwargs: Any) -> Any:
            for one in [param] if param_list is None else param_list:
                if weights_released.is_released(one):
                    weights_released.take_back_blank(one)
                    one.ds_status = ZeroParamStatus.NOT_AVAILABLE
            return original(param_list, *args, **kwargs)

        return all_gather

    def _partition_instead(self, param: Any, original: Any) -> Any:
        """Quantized values go when the parameter goes. Owners hear of values written in GatheredParameters."""

        def partition(param_list: Any = None, hierarchy: int = 0, has_been_updated: bool = False, **kwargs: Any) -> Any:
            listed = [param] if param_list is None else list(param_list)
            chunks = [chunk for one in listed if (chunk := self.chunks.get(id(one))) is not None]
            written: dict[int, tuple[Owner, list[WeightChunk]]] = {}
            if has_been_updated:
                for chunk in chunks:
                    written.setdefault(id(chunk.owner), (chunk.owner, []))[1].append(chunk)
            for owner, of_owner in written.values():
                owner.fp8_before_update(of_owner)
            for one in listed:
                weights_released.take_back_blank(one)
            result = original(param_list, hierarchy, has_been_updated, **kwargs)
            for chunk in chunks:
                chunk.let_go()
            for owner, of_owner in written.values():
                owner.fp8_after_update(of_owner)
            return result

        return partition

    def _let_go(self, param: Any) -> None:
        """What `partition` does to a parameter that nobody has written (`coordinator_stage3`)."""
        chunk = self.chunks.get(id(param))
        if chunk is None or not weights_released.is_released(param):
            free_param(param)
        else:
            weights_released.take_back(param)
            param.data = torch.empty(0, dtype=chunk.dtype, device=chunk.device)
            param.ds_status = ZeroParamStatus.NOT_AVAILABLE
        if chunk is not None:
            chunk.let_go()
