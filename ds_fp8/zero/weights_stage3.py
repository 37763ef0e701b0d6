"""O3 in ZeRO 3: every gather of a weight for an FP8 product carries quantized values.

ZeRO 3 gathers each weight twice per micro-batch, in the forward and in the backward, and lets it go in between. The
owner's chunk of quantized values is made once per step and kept beside its 16-bit chunk; gathers for products then
fetch bytes (`gathers_stage3.py`).

Ranks whose gathers differ hang, or take each other's bytes for weights. So what a gather carries follows from steps,
loads and contexts, which all ranks share, and never from what one rank knows alone: its mode (train or eval, autograd
on or off), or a setter that it calls by itself. In eval mode layers compute with decoded values, as in ZeRO 1 and 2.

Small parameters that DeepSpeed keeps resident (`stage3_param_persistence_threshold`) are not gathered at all, and their
layers cast for themselves: the same quantized values.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ..errors import PlanError
from ..layers import ModelFp8State
from ..layers.recipes.owner import Segment
from ..plan import Plan
from . import weights_released, weights_wrapped
from .chunks_stage3 import WeightChunk, lay_out_chunks
from .gathers_stage3 import QuantizedGathers
from .touched import touched
from .weights import OwnedWeight, WeightCaster
from .weights_asked import AskedTogether

if TYPE_CHECKING:
    from .states_stage3 import StatesStage3 as Base
else:
    Base = object

TOUCHED = {
    "Engine": touched(overrides="load_checkpoint load_module_state_dict", reads="module"),
    "Parameter": touched(reads="ds_persist ds_process_group ds_tensor nvme_swapper"),
    "ZeroStage3": touched(overrides="reduce_ready_partitions_and_remove_grads step", reads="_get_param_coordinator"),
}


class SteppedChunk(WeightChunk):
    """A weight that is stepped: cast again and again from the same 16-bit partition."""

    _segment: Segment | None = None
    _segment_of = 0

    def segment(self) -> Segment | None:
        """The elements of this rank's chunk that are not padding."""
        param, numel = self.weight.param, self.own_numel
        if self._segment is not None and self._segment_of == param.ds_tensor.data_ptr():
            return self._segment
        if not numel:
            return None
        source = param.ds_tensor.data[:numel].to(get_accelerator().current_device_name())
        found = Segment(self.weight, self.first, source, self.chunk[:numel])
        if source.data_ptr() == param.ds_tensor.data_ptr():  # not a copy of what lies on the host
            self._segment, self._segment_of = found, source.data_ptr()
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
        self.fp8_chunks: dict[int, SteppedChunk] = {}
        self.fp8_cast_event: Any = None
        self.fp8_quantized_fresh = False
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
        self.fp8_gathers = QuantizedGathers.of(engine.module, self._get_param_coordinator())
        self.fp8_gathers.add(self, {})

    def _fp8_set_fresh(self, fresh: bool) -> None:
        """Whether the next gathers of weights carry quantized values."""
        if fresh != self.fp8_quantized_fresh:
            self.fp8_quantized_fresh = fresh
            self.fp8_gathers.look()

    def fp8_give_back(self) -> None:
        """The end of the engine: no quantized values in the layers, DeepSpeed's own methods on the parameters."""
        self._fp8_set_fresh(False)
        self.fp8_gathers.remove(self)
        self.fp8_chunks, self.fp8_casters, self.fp8_kept = {}, [], []
        weights_wrapped.end(self)

    def _fp8_forgetting(self, method: Any) -> Any:
        """A load replaces the weights that the quantized values stand for: 16-bit gathers until the next step."""

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._fp8_set_fresh(False)
            return method(*args, **kwargs)

        return wrapped

    def fp8_wants_quantized(self) -> bool:
        return self.fp8_quantized_fresh

    def fp8_before_update(self, chunks: Sequence[WeightChunk]) -> None:
        pass

    def fp8_after_update(self, chunks: Sequence[WeightChunk]) -> None:
        """Values written in GatheredParameters make all quantized ones stale."""
        self._fp8_set_fresh(False)

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
            self.fp8_chunks = lay_out_chunks(self.fp8_kept, self, SteppedChunk)
            self.fp8_gathers.add(self, self.fp8_chunks)
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
