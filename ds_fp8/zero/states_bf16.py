"""BF16_Optimizer: quantized states where DeepSpeed accumulates gradients in fp32 (ZeRO 1) or pipelines (stage 0).

DeepSpeed chooses this wrapper for bf16 with `data_types.grad_accum_dtype` fp32 in stage 1, and for bf16 under a
pipeline without ZeRO. It partitions like ZeRO 1: `fp32_groups_flat_partition[i]` is this rank's master, a slice of
`bf16_groups_flat[i]`. Gradients stay in its accumulation buffer; the step reads the rank's slice of it as it is.

The pipeline engine asks once, at the end of its constructor, whether the optimizer is of this very class, and for any
other does not accumulate into that buffer. Ours is another, so the engine is told before its first forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from ..numerics.dtypes import as_tensor
from .states import ScaledStates
from .states_fragments import link_quantized_fragments
from .touched import touched

if TYPE_CHECKING:
    from .deepspeed_wrappers import Bf16 as Base
else:
    Base = object

TOUCHED = {
    "Bf16": touched(
        overrides="_link_all_hp_params get_grads_for_norm step",
        reads=(
            "_global_grad_norm bf16_groups bf16_partitioned_groups clip_grad fp32_groups_gradient_flat_partition "
            "optimizer real_dp_process_group update_lp_params"
        ),
        writes="fp32_groups_gradient_flat_partition",
        later="_global_grad_norm",
    ),
    "Engine": touched(reads="module"),
    "PipelineEngine": touched(writes="using_bf16_optimizer"),
}


class StatesBF16(ScaledStates, Base):
    """Mixin over `BF16_Optimizer`."""

    FP8_MASTERS = "fp32_groups_flat_partition"

    def fp8_slices(self) -> list[Tensor]:
        return [
            partitions[dist.get_rank(group=group)]
            for partitions, group in zip(self.bf16_partitioned_groups, self.real_dp_process_group, strict=True)
        ]

    def fp8_params(self, index: int) -> list[Any]:
        return self.bf16_groups[index]

    def fp8_shares_storage(self) -> bool:
        comm = self.fp8_plan.comm
        return comm is None or comm.weight_wire == "none" or not comm.fp8_weights

    def fp8_alias_masters(self) -> None:
        # This wrapper knows no base-dtype master: its fp32 clone shrinks to the base dtype here, once.
        for index, (master, own) in enumerate(zip(self.fp8_masters, self.fp8_slices(), strict=True)):
            share = own.data if self.fp8_shares_storage() else own.detach().clone()
            replacement = share.view_as(master).detach()
            replacement.requires_grad = True
            self.fp8_masters[index] = replacement
            self.optimizer.param_groups[index]["params"] = [replacement]
        self._fp8_relink()
        if isinstance(self.fp8_engine, PipelineEngine):
            print_pipeline(self.fp8_engine)

    def _fp8_relink(self) -> None:
        self._link_all_hp_params()

    def _link_all_hp_params(self) -> None:
        super()._link_all_hp_params()
        if not self._fp8_viewing:
            link_quantized_fragments(self, self.bf16_groups, self.fp8_masters)

    def get_grads_for_norm(self, for_clipping: bool = False) -> Any:
        """For clipping, none: the factor goes into the step instead of over every gradient buffer."""
        if not for_clipping:
            return super().get_grads_for_norm(for_clipping)
        coefficient = self.clip_grad / (self._global_grad_norm + 1e-6)
        self.optimizer.grad_scale = torch.clamp(as_tensor(coefficient), max=1.0)
        return []

    def step(self, closure: Any = None) -> None:
        self.optimizer.grad_scale = 1.0
        grads = self.fp32_groups_gradient_flat_partition
        placeholders = []
        for master, grad in zip(self.fp8_masters, grads, strict=True):
            same = grad.dtype == master.dtype
            if not same:
                self.optimizer.gradients[master] = grad
            placeholders.append(
                grad if same else torch.zeros((), dtype=master.dtype, device=grad.device).expand(grad.numel())
            )
        self.fp32_groups_gradient_flat_partition = placeholders
        try:
            super().step(closure)
        finally:
            self.fp32_groups_gradient_flat_partition = grads
            self.optimizer.gradients.clear()
            for master in self.fp8_masters:
                master.grad = None

    def fp8_gather_weights(self) -> None:
        self.update_lp_params()
        self.fp8_weights_changed()


def print_pipeline(engine: Any) -> None:
    """Before the first forward, which is after its constructor, `engine` learns that it has a BF16_Optimizer."""

    def print_rank_0(*_: Any) -> None:
        engine.using_bf16_optimizer = True
        handle.remove()

    handle = engine.module.register_forward_pre_hook(print_rank_0)
