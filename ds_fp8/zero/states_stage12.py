"""ZeRO 1 and 2: quantized states over DeepSpeedZeroOptimizer.

One flat per parameter group: `single_partition_of_fp32_groups[i]`, this rank's partition. It is the optimizer's
parameter and, by aliasing, the rank's slice of the group's 16-bit weights; the all-gather after the step sends it out.
Under offload it lies on the host with storage of its own, and DeepSpeed copies it to the device after the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ..optim.pieces import Pieces
from .states import ScaledStates, refuse_offload_states
from .states_fragments import link_quantized_fragments
from .states_norm import FusedGradNormAndOverflow
from .touched import touched

if TYPE_CHECKING:
    from .deepspeed_wrappers import ZeroStage12 as Base
else:
    Base = object

TOUCHED = {
    "ZeroStage12": touched(
        overrides=(
            "_get_offload_gradient_dict _get_preflattened_grad_partition _link_all_hp_params _optimizer_step "
            "load_hp_checkpoint_state_from_checkpoint_dir offload_states unscale_and_clip_grads"
        ),
        reads=(
            "averaged_gradients bit16_groups cpu_offload optimizer parallel_partitioned_bit16_groups "
            "real_dp_process_group round_robin_bit16_groups update_lp_params"
        ),
        writes="bit16_groups",
    ),
}


class StatesStage12(FusedGradNormAndOverflow, ScaledStates, Base):
    """Mixin over `DeepSpeedZeroOptimizer`."""

    FP8_MASTERS = "single_partition_of_fp32_groups"

    def fp8_slices(self) -> list[Tensor]:
        return [
            partitions[dist.get_rank(group=group)]
            for partitions, group in zip(
                self.parallel_partitioned_bit16_groups, self.real_dp_process_group, strict=True
            )
        ]

    def fp8_params(self, index: int) -> list[Any]:
        return self.bit16_groups[index]

    def fp8_shares_storage(self) -> bool:
        # At O3 too: with the first release of the 16-bit weights a master gets memory of its own (weights_stage12).
        return not self.cpu_offload

    def _fp8_relink(self) -> None:
        self._link_all_hp_params()

    def _link_all_hp_params(self) -> None:
        # DeepSpeed 0.19.8 links in the order of `bit16_groups`; with round_robin_gradients the flats have another, and
        # its fragments show a neighbour's values. In the order of the flats they are right in either case.
        groups, self.bit16_groups = self.bit16_groups, self.round_robin_bit16_groups
        try:
            super()._link_all_hp_params()
        finally:
            self.bit16_groups = groups
        if not self._fp8_viewing:
            link_quantized_fragments(self, self.bit16_groups, self.fp8_masters)

    def _get_offload_gradient_dict(self) -> None:
        # Host gradients hang on the masters; the flats of an fp32 view have none.
        if not self._fp8_viewing:
            super()._get_offload_gradient_dict()

    def unscale_and_clip_grads(self, grad_groups_flat: Any, total_norm: Any) -> None:
        self._fp8_set_grad_scale(total_norm)

    def _get_preflattened_grad_partition(self, group_idx: int) -> Tensor | None:
        """Keep the gradients where they lie, in the dtype that they were summed in.

        DeepSpeed would flatten them, so that they are there twice, and round them to the master's dtype to fit `.grad`.
        It gets a placeholder of the right shape and dtype and no memory; the step reads the real ones, and frees them.
        """
        flat = super()._get_preflattened_grad_partition(group_idx)
        grads = self.averaged_gradients[group_idx] if flat is None else [flat]
        if not grads:  # no backward before this step: DeepSpeed's own error
            return flat
        master = self.fp8_masters[group_idx]
        self.optimizer.gradients[master] = Pieces(grads, master.numel())
        return torch.zeros((), dtype=master.dtype, device=master.device).expand(master.numel())

    def _optimizer_step(self, group_no: int) -> None:
        super()._optimizer_step(group_no)
        self.optimizer.gradients.clear()

    def fp8_gather_weights(self) -> None:
        self.update_lp_params()
        self.fp8_weights_changed()

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        refuse_offload_states(self)

    def load_hp_checkpoint_state_from_checkpoint_dir(self, lp_groups_name: str, checkpoint_dir: str) -> None:
        # Fragments are relinked to the fp32 view's flats before DeepSpeed fills them (`_fp8_relink`).
        assert self._fp8_viewing, "universal checkpoints are loaded through load_state_dict"
        super().load_hp_checkpoint_state_from_checkpoint_dir(lp_groups_name, checkpoint_dir)
