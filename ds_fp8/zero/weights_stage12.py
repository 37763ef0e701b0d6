"""O3 in ZeRO 1 and 2: between steps a rank holds quantized values, not a second 16-bit copy of every weight.

DeepSpeed keeps all 16-bit weights of a parameter group in one flat tensor, gathered after each step. Here the flat's
memory is given back, and a store of quantized values and one of the rest take its place (`weights_store`). Readers
outside of the layer get decoded values; writers are refused (`weights_released`).

The 16-bit weights come back (`restore`, a gather from the masters) and leave again with the next step (after a context,
at its end):

    by contract of all ranks     save_checkpoint, load_checkpoint, save_16bit_model, a pipeline's eval_batch,
                                 `deepspeed.zero.GatheredParameters`
    if all ranks ask             state_dict() and load_state_dict() of the model or of a layer in it. A rank that asks
                                 alone gets an error after some seconds

A forward never brings them: in eval mode layers read decoded values, on any number of ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ..comm.route import group_ranks
from ..layers import ModelFp8State
from ..plan import Plan
from . import weights_gathered, weights_wrapped
from .states_fragments import QuantizedFragment
from .touched import touched
from .weights import OwnedWeight
from .weights_asked import AskedTogether, watch_modules
from .weights_released import raw
from .weights_store import GroupStore, flat_layout

if TYPE_CHECKING:
    from .states_stage12 import StatesStage12 as Base
else:
    Base = object

TOUCHED = {
    "Engine": touched(overrides="load_checkpoint save_16bit_model save_checkpoint", reads="module"),
    "Parameter": touched(reads="_hp_mapping"),
    "TensorFragment": touched(reads="get_hp_fragment"),
    "ZeroStage12": touched(
        overrides=(
            "_restore_from_bit16_weights _update_model_bit16_weights reduce_ready_partitions_and_remove_grads step "
            "update_lp_params"
        ),
        reads="bit16_groups_flat cpu_offload parallel_partitioned_bit16_groups single_partition_of_fp32_groups",
        writes="bit16_groups_flat parallel_partitioned_bit16_groups",
        later="param_buffer_of_bit16_for_cpu_offload_groups",
    ),
}

COLLECTIVE = ("save_checkpoint", "save_16bit_model", "load_checkpoint", "eval_batch")
"""Methods of the engine that all ranks call, and that read or write 16-bit weights."""


class WeightsStage12(Base):
    """Mixin over `DeepSpeedZeroOptimizer`: the gather after the step carries quantized values."""

    fp8_stores: list[GroupStore]
    _fp8_stepping = False

    def fp8_lay_out_weights(
        self, engine: Any, weights: list[OwnedWeight], plan: Plan, fp8_state: ModelFp8State
    ) -> None:
        self.fp8_weight_plan, self.fp8_layers_state = plan, fp8_state
        self.fp8_stores = [
            GroupStore(self, index, weights, fp8_state, plan) for index in range(len(self.bit16_groups_flat))
        ]
        self.fp8_asked = AskedTogether(
            [(store.group, [weight for weight, _, _ in store.fp8_weights]) for store in self.fp8_stores]
        )
        quantized = [weight.layer for store in self.fp8_stores for weight, _, _ in store.fp8_weights]
        self.fp8_hooks = watch_modules(self, engine.module, quantized)
        weights_gathered.watch(self)
        weights_wrapped.begin(self)
        for name in COLLECTIVE:
            if hasattr(engine, name) and not (name == "eval_batch" and plan.fp8.eval):
                setattr(engine, name, self._fp8_with_weights(getattr(engine, name), name == "load_checkpoint"))

    def _fp8_with_weights(self, method: Any, is_load: bool) -> Any:
        """DeepSpeed's savers call state_dict() on some ranks only: gather before, on all of them."""

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.fp8_high_precision_weights():
                result = method(*args, **kwargs)
                if is_load:
                    self.fp8_weights_replaced()
                return result

        return wrapped

    def fp8_weights_replaced(self) -> None:
        """Weights are written from outside, on all ranks: 16-bit ones everywhere, and no quantized values until the
        next step.
        """
        self.fp8_restore_weights()
        for store in self.fp8_stores:
            store.forget_quantized()

    @contextmanager
    def fp8_high_precision_weights(self) -> Iterator[None]:
        """16-bit weights for the length of a block; collective."""
        released = [store for store in self.fp8_stores if store.is_released]
        self.fp8_restore_weights()
        try:
            yield
        finally:
            for store in released:
                # A load inside has made new weights, whose quantized values do not exist yet: they stay.
                if store.has_quantized and not store.is_released:
                    store.keep_rest()
                    store.release()

    def fp8_give_back(self) -> None:
        """The end of the engine: weights in torch Parameters, hooks off the model.

        In 16 bits where all ranks end it together; a rank that does so alone keeps the decoded values.
        """
        for index, store in enumerate(self.fp8_stores):
            if not store.is_released:
                continue
            if self.fp8_asked.ends_together(index):
                store.restore(self._fp8_own16(index))
            else:
                store.settle()
        for store in self.fp8_stores:
            store.forget_quantized()
        for hook in self.fp8_hooks:
            hook.remove()
        weights_gathered.unwatch(self)
        weights_wrapped.end(self)
        self.fp8_hooks, self.fp8_stores = [], []

    def fp8_stored_params(self) -> Iterator[Any]:
        """Every parameter that may be released, or whose memory moves when weights are."""
        for store in self.fp8_stores:
            yield from (weight.param for weight, _, _ in store.fp8_weights)
            yield from (param for param, _, _ in store.rest)

    @contextmanager
    def fp8_gathered(self, params: list[Any], modifier_rank: int | None) -> Iterator[None]:
        """What `GatheredParameters` does with these parameters (see weights_gathered); collective."""
        with self.fp8_high_precision_weights():
            before = None
            if modifier_rank is not None:
                before = [self._fp8_own16(index) for index in range(len(self.fp8_stores))]
                # Until the first release the master is a part of what is about to be written.
                before = [
                    own.clone() if own.untyped_storage()._cdata == store.flat.untyped_storage()._cdata else own
                    for own, store in zip(before, self.fp8_stores, strict=True)
                ]
            yield
            if before is None or modifier_rank is None:
                return
            chosen = {id(param) for param in params}
            for index, store in enumerate(self.fp8_stores):
                source = group_ranks(store.group)[modifier_rank]
                for param, offset in flat_layout(self, index):
                    if id(param) in chosen:
                        dist.broadcast(param.data, source, group=store.group)
                        self._fp8_write_master(store, param, offset, before[index])
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
                if isinstance(fragment, QuantizedFragment):
                    fragment.set_hp_fragment(value)
                else:
                    master.copy_(value)

    def fp8_restore_weights(self) -> None:
        """16-bit weights in torch Parameters, until the next step; collective."""
        for index, store in enumerate(self.fp8_stores):
            if store.is_released:
                store.restore(self._fp8_own16(index))

    def fp8_restore_if_all_ask(self, asked: str) -> None:
        """The same for a call that one rank may have made alone: raises WeightError there."""
        for index, store in enumerate(self.fp8_stores):
            if store.is_released:
                self.fp8_asked.require(index, asked)
                store.restore(self._fp8_own16(index))

    def fp8_set_weight(self, param: Any, value: Tensor) -> None:
        """A setter of fp32 values (`safe_set_full_fp32_param`) writes the 16-bit weight too: it must be there."""
        self.fp8_restore_if_all_ask("a setter of DeepSpeed's")
        super().fp8_set_weight(param, value)

    def fp8_weights_changed(self) -> None:
        """New masters (a load, a setter): no quantized values until the next step."""
        self.fp8_restore_if_all_ask("a setter of DeepSpeed's")
        self.fp8_weights_replaced()
        changed = getattr(super(), "fp8_weights_changed", None)
        if changed is not None:
            changed()

    def _fp8_own16(self, index: int) -> Tensor:
        """This rank's 16-bit partition, on the device of the weights."""
        return self.single_partition_of_fp32_groups[index].detach().to(self.fp8_stores[index].others)

    def _fp8_quantized_next(self) -> bool:
        """Whether the forward after this step will use quantized values; not before `start_step`."""
        fp8_state = self.fp8_layers_state
        return fp8_state is not None and fp8_state.steps + 1 >= self.fp8_weight_plan.fp8.start_step

    def reduce_ready_partitions_and_remove_grads(self, param: Any, i: int) -> None:
        # DeepSpeed looks at a parameter some twenty times here, and wants it as it is.
        with raw():
            super().reduce_ready_partitions_and_remove_grads(param, i)

    def step(self, closure: Any = None) -> None:
        """DeepSpeed's step without its gather, then ours.

        Also after a skipped step: layers that cast for themselves would cast the same weights under a newer scale now.
        """
        if not self.fp8_stores or not self._fp8_quantized_next():
            self.fp8_restore_weights()
            super().step(closure)
            self.fp8_asked.moment += 1
            return
        flats, partitions = self.bit16_groups_flat, self.parallel_partitioned_bit16_groups
        # Its copy of the master into the 16-bit partition becomes a copy onto itself, its gather finds no groups.
        self.parallel_partitioned_bit16_groups = [
            [self._fp8_master_copy(index)] * len(own) for index, own in enumerate(partitions)
        ]
        self.bit16_groups_flat = []
        self._fp8_stepping = True
        try:
            with raw():
                super().step(closure)
        finally:
            self._fp8_stepping = False
            self.bit16_groups_flat, self.parallel_partitioned_bit16_groups = flats, partitions
        self._fp8_part_masters()
        with raw():
            for index, store in enumerate(self.fp8_stores):
                store.refresh(self._fp8_own16(index))
        self.fp8_asked.moment += 1

    def _fp8_part_masters(self) -> None:
        """Masters that lie in a flat about to be released get memory of their own; the whole of a flat is that
        already.
        """
        moved = False
        for master, store in zip(self.single_partition_of_fp32_groups, self.fp8_stores, strict=True):
            shared = not store.is_released and master.untyped_storage()._cdata == store.flat.untyped_storage()._cdata
            if shared and store.world_size > 1:
                master.data = master.data.clone()
                moved = True
        if moved:
            self._fp8_relink()

    def _fp8_master_copy(self, index: int) -> Tensor:
        if self.cpu_offload:
            return self.param_buffer_of_bit16_for_cpu_offload_groups[index]
        return self.single_partition_of_fp32_groups[index].detach()

    def _update_model_bit16_weights(self, group_index: int) -> None:
        if not self._fp8_stepping:
            super()._update_model_bit16_weights(group_index)

    def update_lp_params(self) -> None:
        """New masters (a load, a setter): 16-bit weights of all ranks again, and no quantized values until the next
        step.
        """
        self.fp8_weights_replaced()
        super().update_lp_params()

    def _restore_from_bit16_weights(self) -> None:
        self.fp8_weights_replaced()
        super()._restore_from_bit16_weights()
