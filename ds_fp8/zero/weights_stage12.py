"""O3 in ZeRO 1 and 2: between steps a rank holds codes, not a second 16-bit copy of every weight.

DeepSpeed keeps all 16-bit weights of a parameter group in one flat tensor, gathered after each step. Here the flat's
memory is given back, and two stores take its place:

    codes   1 byte for each element that an FP8 layer owns, in the flat's order; the layers hold views of it
    rest    16 bits for all others (norms, biases, embeddings, ...)

Both keep the flat's order, so the share of a rank is one range of each store: the owner casts and copies straight
into its range and the gather fills the others in place.

The 16-bit weights come back (`restore`, a gather from the masters, collective like any ZeRO-3 gather) for checkpoints,
`state_dict()`, evaluation in high precision and `deepspeed.zero.GatheredParameters`, and leave again with the next step
(after a context, at its end). A released parameter reads as NaN: loud, never wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ..comm.counters import all_gather_bytes, counters
from ..comm.gather import all_gather_shares
from ..comm.route import group_ranks
from . import weights_gathered
from .states_fragments import CodedFragment
from .weights import OwnedWeight, Segment, WeightCaster, drop_codes, set_codes, stand_in

ALIGNMENT = 16
"""Elements to which each weight's codes are aligned: scaled_mm wants 16 bytes."""


class GroupStore:
    """Codes and rest of one parameter group.

    bounds   of each store by rank: rank r owns [bounds[r], bounds[r + 1])
    """

    def __init__(self, optimizer: Any, index: int, weights: list[OwnedWeight], book: Any, plan: Any):
        self.optimizer, self.index = optimizer, index
        self.group = optimizer.real_dp_process_group[index]
        self.world_size, self.rank = dist.get_world_size(group=self.group), dist.get_rank(group=self.group)
        self.flat: Tensor = optimizer.bit16_groups_flat[index]
        self.partition_numel = self.flat.numel() // self.world_size
        self.flat_bytes = self.flat.untyped_storage().nbytes()
        by_param = {id(weight.param): weight for weight in weights}
        self.coded: list[tuple[OwnedWeight, int, int]] = []
        self.rest: list[tuple[Any, int, int]] = []
        self.code_numel = self.rest_numel = 0
        for param, offset in flat_layout(optimizer, index):
            weight = by_param.get(id(param))
            if weight is not None:
                self.coded.append((weight, offset, self.code_numel))
                self.code_numel += -(-weight.numel // ALIGNMENT) * ALIGNMENT
            else:
                self.rest.append((param, offset, self.rest_numel))
                self.rest_numel += param.numel()
        spans = [(offset, weight.numel, at) for weight, offset, at in self.coded]
        self.code_bounds = share_bounds(spans, self.code_numel, self.partition_numel, self.world_size)
        spans = [(offset, param.numel(), at) for param, offset, at in self.rest]
        self.rest_bounds = share_bounds(spans, self.rest_numel, self.partition_numel, self.world_size)
        self.codes = torch.zeros(self.code_numel, dtype=torch.uint8, device=self.flat.device)
        self.others = torch.zeros(self.rest_numel, dtype=self.flat.dtype, device=self.flat.device)
        self.shapes = {id(param): param.shape for param, _, _ in self.rest}
        self.caster = WeightCaster([weight for weight, _, _ in self.coded], book, plan, self.group, self.flat.device)

    @property
    def is_released(self) -> bool:
        return self.flat.untyped_storage().nbytes() == 0

    def refresh(self, own: Tensor) -> None:
        """After a step: `own` is this rank's new 16-bit partition; codes and rest go out, the flat's memory goes."""
        segments = []
        for weight, offset, at in self.coded:
            for start, stop in self.own_part(offset, weight.numel):
                here = own[start + offset - self.first : stop + offset - self.first]
                segments.append(Segment(weight, start, here, self.codes[at + start : at + stop]))
        for param, offset, at in self.rest:
            for start, stop in self.own_part(offset, param.numel()):
                here = own[start + offset - self.first : stop + offset - self.first]
                self.others[at + start : at + stop].copy_(here)
        scale_inv = self.caster.cast(segments)
        all_gather_shares(self.codes, self.code_bounds, self.group)
        all_gather_shares(self.others, self.rest_bounds, self.group)
        counters.add("weight", 0, all_gather_bytes(own.numel() * own.element_size(), self.world_size))
        for (weight, _, at), inverse in zip(self.coded, scale_inv, strict=True):
            set_codes(weight, self.codes[at : at + weight.numel], inverse)
        self.release()

    def release(self) -> None:
        """Point parameters away from the flat and give its memory back."""
        for weight, _, _ in self.coded:
            weight.param.data = stand_in(self.flat, weight.shape)
        for param, _, at in self.rest:
            shape = self.shapes[id(param)]
            param.data = self.others[at : at + shape.numel()].view(shape)
        self.flat.untyped_storage().resize_(0)

    def restore(self, own: Tensor) -> None:
        """Gather the 16-bit weights from the masters again. Codes stay: FP8 products go on using them."""
        if self.is_released:
            self.flat.untyped_storage().resize_(self.flat_bytes)
        mine = self.flat[self.first : self.first + self.partition_numel]
        mine.copy_(own)
        if self.world_size > 1:
            dist.all_gather_into_tensor(self.flat, mine.clone(), group=self.group)
            counters.add("weight", all_gather_bytes(mine.numel() * mine.element_size(), self.world_size))
        for weight, offset, _ in self.coded:
            weight.param.data = self.flat[offset : offset + weight.numel].view(weight.shape)
        for param, offset, _ in self.rest:
            shape = self.shapes[id(param)]
            param.data = self.flat[offset : offset + shape.numel()].view(shape)

    def forget_codes(self) -> None:
        for weight, _, _ in self.coded:
            drop_codes(weight)

    @property
    def first(self) -> int:
        return self.rank * self.partition_numel

    def own_part(self, offset: int, numel: int) -> Iterator[tuple[int, int]]:
        """(start, stop) within the parameter that lie in this rank's partition; nothing if none do."""
        start = max(0, self.first - offset)
        stop = min(numel, self.first + self.partition_numel - offset)
        if start < stop:
            yield start, stop


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


class WeightsStage12:
    """Mixin over `DeepSpeedZeroOptimizer`: the gather after the step carries codes."""

    fp8_stores: list[GroupStore]
    _fp8_stepping = False

    def fp8_lay_out_weights(self: Any, engine: Any, weights: list[OwnedWeight], plan: Any, book: Any) -> None:
        self.fp8_weight_plan, self.fp8_weight_book = plan, book
        self.fp8_stores = [GroupStore(self, index, weights, book, plan) for index in range(len(self.bit16_groups_flat))]
        self._fp8_watch(engine)

    def _fp8_watch(self: Any, engine: Any) -> None:
        """Bring 16-bit weights back wherever somebody is about to read them."""
        module = engine.module
        before = module.register_forward_pre_hook(lambda root, args: self._fp8_before_forward(root), prepend=True)
        self._fp8_hooks = [before]
        # The root, and each layer with codes: so state_dict() of any module that holds one comes here.
        coded = [weight.layer for store in self.fp8_stores for weight, _, _ in store.coded]
        for one in dict.fromkeys([module, *coded]):
            self._fp8_hooks.append(one.register_state_dict_pre_hook(lambda *args: self.fp8_restore_weights()))
            self._fp8_hooks.append(one.register_load_state_dict_pre_hook(lambda *args: self.fp8_weights_replaced()))
        weights_gathered.watch(self)
        for name in ("save_checkpoint", "save_16bit_model", "load_checkpoint"):
            setattr(engine, name, self._fp8_with_weights(getattr(engine, name), name == "load_checkpoint"))

    def _fp8_with_weights(self: Any, method: Any, is_load: bool) -> Any:
        """DeepSpeed's savers call state_dict() on some ranks only: gather before, on all of them."""

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.fp8_high_precision_weights():
                result = method(*args, **kwargs)
                if is_load:
                    self.fp8_weights_replaced()
                return result

        return wrapped

    def fp8_weights_replaced(self: Any) -> None:
        """Weights are written from outside: 16-bit ones everywhere, and no codes until the next step."""
        for store in self.fp8_stores:
            store.forget_codes()
        self.fp8_restore_weights()

    @contextmanager
    def fp8_high_precision_weights(self: Any) -> Iterator[None]:
        """16-bit weights for the length of a block; collective."""
        released = [store for store in self.fp8_stores if store.is_released]
        self.fp8_restore_weights()
        try:
            yield
        finally:
            for store in released:
                # A load inside has made new weights, whose codes do not exist yet: they stay.
                if store.coded and store.coded[0][0].layer.weight_codes is not None:
                    self._fp8_keep_rest(store)
                    store.release()

    def fp8_give_back(self: Any) -> None:
        """The end of the engine: 16-bit weights in the parameters, hooks off the model. Collective where some are released."""
        self.fp8_weights_replaced()
        for hook in self._fp8_hooks:
            hook.remove()
        weights_gathered.unwatch(self)
        self._fp8_hooks, self.fp8_stores = [], []

    def fp8_stored_params(self: Any) -> Iterator[Any]:
        """Every parameter that may read as a stand-in, or whose memory moves when weights are released."""
        for store in self.fp8_stores:
            yield from (weight.param for weight, _, _ in store.coded)
            yield from (param for param, _, _ in store.rest)

    @contextmanager
    def fp8_gathered(self: Any, params: list[Any], modifier_rank: int | None) -> Iterator[None]:
        """What `GatheredParameters` does with these parameters (see weights_gathered); collective."""
        with self.fp8_high_precision_weights():
            yield
            if modifier_rank is None:
                return
            chosen = {id(param) for param in params}
            for index, store in enumerate(self.fp8_stores):
                old = self._fp8_own16(index)
                source = group_ranks(store.group)[modifier_rank]
                for param, offset in flat_layout(self, index):
                    if id(param) in chosen:
                        dist.broadcast(param.data, source, group=store.group)
                        self._fp8_write_master(store, param, offset, old)
            self.fp8_weights_replaced()

    @staticmethod
    def _fp8_write_master(store: GroupStore, param: Any, offset: int, old: Tensor) -> None:
        """Elements of the own part that differ from the master's 16 bits replace it; the others keep their low bits."""
        for start, stop in store.own_part(offset, param.numel()):
            new = param.data.view(-1)[start:stop]
            changed = new != old[start + offset - store.first : stop + offset - store.first]
            if changed.any():
                fragment = param._hp_mapping
                master = fragment.get_hp_fragment()
                value = torch.where(changed.to(master.device), new.to(master), master)
                if isinstance(fragment, CodedFragment):
                    fragment.set_hp_fragment(value)
                else:
                    master.copy_(value)

    @staticmethod
    def _fp8_keep_rest(store: GroupStore) -> None:
        for param, _, at in store.rest:
            store.others[at : at + param.numel()].copy_(param.data.view(-1))

    def fp8_restore_weights(self: Any) -> None:
        for index, store in enumerate(self.fp8_stores):
            if store.is_released:
                store.restore(self._fp8_own16(index))

    def fp8_set_weight(self: Any, param: Any, value: Tensor) -> None:
        """A setter of fp32 values (`safe_set_full_fp32_param`) writes the 16-bit weight too: it must be there."""
        self.fp8_restore_weights()
        super().fp8_set_weight(param, value)

    def fp8_weights_changed(self: Any) -> None:
        """New masters (a load, a setter): no codes until the next step."""
        self.fp8_weights_replaced()
        changed = getattr(super(), "fp8_weights_changed", None)
        if changed is not None:
            changed()

    def _fp8_own16(self: Any, index: int) -> Tensor:
        """This rank's 16-bit partition, on the device of the weights."""
        return self.single_partition_of_fp32_groups[index].detach().to(self.fp8_stores[index].flat)

    def _fp8_before_forward(self: Any, root: torch.nn.Module) -> None:
        if not root.training and not self.fp8_weight_plan.fp8.eval:
            self.fp8_restore_weights()

    def _fp8_codes_next(self: Any) -> bool:
        """Whether the forward after this step will use codes; not before `start_step`."""
        book = self.fp8_weight_book
        return book is not None and book.steps + 1 >= self.fp8_weight_plan.fp8.start_step

    def step(self: Any, closure: Any = None) -> None:
        """DeepSpeed's step without its gather, then ours.

        Also after a skipped step: layers that cast for themselves would cast the same weights under a newer scale now.
        """
        if not self.fp8_stores or not self._fp8_codes_next():
            self.fp8_restore_weights()
            super().step(closure)
            return
        flats, partitions = self.bit16_groups_flat, self.parallel_partitioned_bit16_groups
        # Its copy of the master into the 16-bit partition becomes a copy onto itself, its gather finds no groups.
        self.parallel_partitioned_bit16_groups = [
            [self._fp8_master_copy(index)] * len(own) for index, own in enumerate(partitions)
        ]
        self.bit16_groups_flat = []
        self._fp8_stepping = True
        try:
            super().step(closure)
        finally:
            self._fp8_stepping = False
            self.bit16_groups_flat, self.parallel_partitioned_bit16_groups = flats, partitions
        for index, store in enumerate(self.fp8_stores):
            store.refresh(self._fp8_own16(index))

    def _fp8_master_copy(self: Any, index: int) -> Tensor:
        if self.cpu_offload:
            return self.param_buffer_of_bit16_for_cpu_offload_groups[index]
        return self.single_partition_of_fp32_groups[index].detach()

    def _update_model_bit16_weights(self: Any, group_index: int) -> None:
        if not self._fp8_stepping:
            super()._update_model_bit16_weights(group_index)

    def update_lp_params(self: Any) -> None:
        """New masters (a load, a setter): 16-bit weights of all ranks again, and no codes until the next step."""
        self.fp8_weights_replaced()
        super().update_lp_params()

    def _restore_from_bit16_weights(self: Any) -> None:
        self.fp8_weights_replaced()
        super()._restore_from_bit16_weights()
