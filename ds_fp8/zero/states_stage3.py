"""ZeRO 3: quantized states over DeepSpeedZeroOptimizer_Stage3.

One flat per *sub-group* of parameters: `fp32_partitioned_groups_flat[i]`, this rank's shares of its parameters, one
after the other. It is the optimizer's parameter and, by aliasing, the 16-bit flat that the all-gathers of the next
forward read. Nothing is gathered after the step except the parameters that DeepSpeed keeps whole ("persistent").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ..comm.cut import join
from .persistent_parameters import gather_together
from .states import ScaledStates, refuse_offload_states
from .states_client import Fragment
from .states_fragments import read_slice, write_slice
from .states_norm import FusedGradNorm
from .touched import touched

if TYPE_CHECKING:
    from .deepspeed_wrappers import ZeroStage3 as Base
else:
    Base = object

TOUCHED = {
    "Parameter": touched(reads="ds_numel ds_shape ds_tensor"),
    "ZeroStage3": touched(
        overrides=(
            "_fp32_state_allgather _get_fp32_opt_state_partition _optimizer_step _post_step "
            "_prepare_fp32_grad_for_sub_group get_hp_param_device offload_states set_full_hp_param set_local_hp_param "
            "unscale_and_clip_grads"
        ),
        reads=(
            "_get_param_partition_group _get_param_partition_rank _unflatten_partitioned_parameters averaged_gradients "
            "fp16_groups fp16_partitioned_groups_flat get_param_id grad_position offload_optimizer optimizer "
            "persistent_parameters"
        ),
        writes="persistent_parameters",
    ),
}


class StatesStage3(FusedGradNorm, ScaledStates, Base):
    """Mixin over `DeepSpeedZeroOptimizer_Stage3`."""

    FP8_MASTERS = "fp32_partitioned_groups_flat"

    def fp8_slices(self) -> list[Tensor]:
        return self.fp16_partitioned_groups_flat

    def fp8_params(self, index: int) -> list[Any]:
        return self.fp16_groups[index]

    def fp8_fragments(self, index: int) -> list[Fragment]:
        """This rank's shares; the last rank's ends in padding."""
        fragments = []
        for param in self.fp16_groups[index]:
            _, start_in_flat, share = self.grad_position[self.get_param_id(param)]
            start = share * self._get_param_partition_rank(param)
            numel = min(share, param.ds_numel - start)
            if numel > 0:
                fragments.append(Fragment(param, start, start_in_flat, numel))
        return fragments

    def fp8_shares_storage(self) -> bool:
        return not self.offload_optimizer

    def _fp8_group_params(self, flats: list[Tensor]) -> list[list[Tensor]]:
        # Stage 3 leaves the groups empty between steps and fills them when it saves and loads.
        return [[] for _ in self.optimizer.param_groups]

    def _fp8_took_fp32(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        return True

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Any) -> None:
        self._fp8_set_grad_scale(total_norm)

    def _prepare_fp32_grad_for_sub_group(self, sub_group_id: int) -> None:
        """Hand the sub-group's gradients to the step as they lie: one contiguous run, in the dtype they were summed
        in.
        """
        master = self.fp8_masters[sub_group_id]
        flat = join([grad.reshape(-1) for grad in self.averaged_gradients[sub_group_id]])
        assert flat.numel() == master.numel(), (
            f"sub-group {sub_group_id}: {flat.numel()} gradients, {master.numel()} weights"
        )
        if flat.dtype == master.dtype:
            master.grad = flat
        else:
            self.optimizer.gradients[master] = flat
            master.grad = torch.zeros((), dtype=master.dtype, device=flat.device).expand(flat.numel())
        self.averaged_gradients[sub_group_id] = None

    def _optimizer_step(self, sub_group_id: int) -> None:
        super()._optimizer_step(sub_group_id)
        self.optimizer.gradients.clear()

    def _post_step(self, timer_names: Any) -> None:
        """DeepSpeed's epilogue, which gathers the parameters that stay whole; most of them are there before."""
        whole = self.persistent_parameters
        self.persistent_parameters = gather_together(whole, self._get_param_partition_group)
        try:
            super()._post_step(timer_names)
        finally:
            self.persistent_parameters = whole

    def _get_fp32_opt_state_partition(
        self, param: Any, release_swap_buffers: bool, optim_state_key: str | None = None
    ) -> tuple[Tensor, int]:
        """This rank's share of a parameter's master or state, decoded to fp32."""
        group_idx, dest_offset, num_elements = self.grad_position[self.get_param_id(param)]
        key = optim_state_key or "master"
        share = read_slice(self.optimizer, self.fp8_masters[group_idx], key, int(dest_offset), int(num_elements))
        return share, group_idx

    def _fp32_state_allgather(self, param: Any, fp32_state_partition: Tensor) -> Tensor:
        """As DeepSpeed's, but in fp32: masters have the base dtype here, what is decoded from them has not."""
        group = self._get_param_partition_group(param)
        share = fp32_state_partition.to(param.device, torch.float32).contiguous()
        full = torch.empty(dist.get_world_size(group=group) * share.numel(), dtype=torch.float32, device=param.device)
        dist.all_gather_into_tensor(full, share, group=group)
        return full.narrow(0, 0, param.ds_numel).view(param.ds_shape)

    def set_full_hp_param(self, value: Tensor, param: Any, optim_state_key: str | None = None) -> None:
        if not param.requires_grad:
            return
        assert value.numel() == param.ds_numel, f"{value.numel()} values for a parameter of {param.ds_numel}"
        group_idx, _, num_elements = self.grad_position[self.get_param_id(param)]
        start = int(num_elements) * self._get_param_partition_rank(param)
        share = torch.zeros(int(num_elements), dtype=torch.float32, device=self.fp8_masters[group_idx].device)
        mine = value.detach().reshape(-1)[start : start + int(num_elements)]
        share[: mine.numel()].copy_(mine)
        self._fp8_write_share(param, share, optim_state_key)

    def set_local_hp_param(self, value: Tensor, param: Any, optim_state_key: str | None = None) -> None:
        if not param.requires_grad:
            return
        assert value.numel() == param.ds_tensor.numel(), (
            f"{value.numel()} values for a share of {param.ds_tensor.numel()}"
        )
        self._fp8_write_share(param, value.detach().reshape(-1).float(), optim_state_key)

    def _fp8_write_share(self, param: Any, share: Tensor, optim_state_key: str | None) -> None:
        group_idx, dest_offset, _ = self.grad_position[self.get_param_id(param)]
        write_slice(self.optimizer, self.fp8_masters[group_idx], optim_state_key or "master", int(dest_offset), share)
        if optim_state_key is None:
            self._fp8_publish(group_idx)

    def _fp8_publish(self, group_idx: int) -> None:
        """The 16-bit half of a master that was written outside of a step, to where the gathers read it."""
        own = self.fp8_slices()[group_idx]
        if own is not None:
            own.data.copy_(self.fp8_masters[group_idx].data)
        self.fp8_weights_changed()

    def fp8_gather_weights(self) -> None:
        """After a load: 16-bit flats are the masters' upper halves; whole parameters are gathered by DeepSpeed's
        epilogue.
        """
        for index, own in enumerate(self.fp8_slices()):
            if own is not None:
                own.data.copy_(self.fp8_masters[index].data)
                self._unflatten_partitioned_parameters(index)
        self.fp8_weights_changed()

    def get_hp_param_device(self, param: Any, optim_state_key: str | None = None) -> torch.device | None:
        if not param.requires_grad:
            return None
        group_idx, _, _ = self.grad_position[self.get_param_id(param)]
        return self.fp8_masters[group_idx].device

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        refuse_offload_states(self)
