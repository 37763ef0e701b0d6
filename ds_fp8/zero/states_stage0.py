"""Stage 0: no partition, no fp32 copy; every rank steps every parameter in place.

Without ZeRO DeepSpeed wraps a bf16 or fp16 job's optimizer into one that clones all weights to fp32. Here the optimizer's
parameters *are* the model's: its 16-bit value is the upper half of its master, the rest lies in the state. What DeepSpeed
does around the step (overflow, norm, clip, loss scale) is inherited or repeated number for number.

fp16 in stage 0 needs one repair. Since 0.18.4 `engine.backward` scales the loss only for ZeRO's optimizers, while this
wrapper still divides the gradients by the loss scale: updates come out 2^16 too small. The engine has one door left, the
GradScaler that it keeps for torch.autocast; `LossScaleDoor` stands there and scales the loss as DeepSpeed once did.

Rounding draws the same bits on all ranks, as replicas must not drift apart.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.utils import split_params_grads_into_shared_and_expert_params
from deepspeed.runtime import utils as runtime_utils  # by module: older releases lack some names, and must import this
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import CheckOverflow, get_global_norm, get_weight_norm
from torch import Tensor

from .states import KEY, codes_state, load_codes
from .states_stage0_formats import Loaded, read_state, write_state


class LossScaleDoor:
    """What the engine takes for torch's GradScaler: scales the loss, leaves everything else to the optimizer."""

    def __init__(self, optimizer: Stage0Optimizer):
        self.optimizer = optimizer

    def scale(self, loss: Tensor) -> Tensor:
        return loss.float() * self.optimizer.loss_scale

    def unscale_(self, optimizer: Any) -> None:
        """Unscaling is folded into the step."""

    def step(self, optimizer: Any) -> None:
        optimizer.step()

    def update(self) -> None:
        """The optimizer moves its own loss scale, after its own overflow check."""


class Stage0Optimizer(FP16_UnfusedOptimizer):
    """`FP16_UnfusedOptimizer` for every base dtype, with the model's parameters in place of fp32 copies.

    layout  form of the fp32 part of checkpoints: that of the wrapper which DeepSpeed would have chosen without us
            (`fused`, `unfused`, or `bare` for an fp32 base)
    """

    def __init__(self, optimizer: Any, engine: Any, *, loss_scale_config: Any, clip_grad: float, mpu: Any, layout: str):
        self.optimizer = optimizer
        self.fp8_engine = engine
        self.layout = layout
        self.fused_lamb_legacy = False
        self.loss_scale_config = loss_scale_config
        self.custom_loss_scaler = False
        self.external_loss_scale = None
        self.verbose = True
        self.clip_grad = clip_grad
        self.norm_type = 2
        self.mpu = mpu
        self.overflow = False
        self._global_grad_norm: Any = 0.0
        self.fp16_groups = []
        for group in optimizer.param_groups:
            group["params"] = [param for param in group["params"] if runtime_utils.is_optimized_parameter(param)]
            self.fp16_groups.append(group["params"])
        # The same objects: whoever walks DeepSpeed's fp32 copies meets the model's parameters.
        self.fp32_groups = self.fp16_groups
        self.low_precision_dtype = self.fp16_groups[0][0].dtype
        if self.low_precision_dtype == torch.float32:
            self._global_grad_norm = None  # clipped by the engine, which reports no norm for it
        self.overflow_checker = CheckOverflow(self.fp16_groups, mpu=mpu, deepspeed=engine)
        if self.low_precision_dtype == torch.float16:
            engine.torch_autocast_z0_gradscaler = LossScaleDoor(self)

    @property
    def fp8_masters(self) -> list[Tensor]:
        """All parameters, group by group."""
        return [param for group in self.fp16_groups for param in group]

    def step(self, closure: Any = None) -> bool:
        if self.low_precision_dtype == torch.float32:
            # An fp32 job: the engine has clipped already and checks nothing.
            self.optimizer.grad_scale = 1.0
            self.optimizer.step()
            return False
        self.overflow = self.overflow_checker.check()
        if self.overflow:
            return self._skip_invalid_grad_norm()
        norms = []
        for group in self.fp16_groups:
            grads, _ = split_params_grads_into_shared_and_expert_params(group)
            norms.append(get_weight_norm(grads, mpu=self.mpu) if grads else 0.0)
        self._global_grad_norm = get_global_norm(norm_list=norms)
        if runtime_utils.is_invalid_grad_norm(self._global_grad_norm):
            return self._skip_invalid_grad_norm()
        scaled_norm = self._global_grad_norm
        # Before the loss scale moves: these gradients were made with the present one.
        self.optimizer.grad_scale = 1.0 / self.unscale_and_clip_grads(scaled_norm, apply_scale=False)
        self._global_grad_norm = scaled_norm / self.loss_scale_config.cur_scale
        self._update_scale(False)
        self.optimizer.step()
        return self.overflow

    def refresh_fp32_params(self) -> None:
        """Masters from the 16-bit weights: remainders of older masters go."""
        for param in self.fp8_masters:
            self.optimizer.import_fp32(param, master=param.detach().float())

    def fp8_layout(self) -> dict[str, Any]:
        masters = self.fp8_masters
        return {
            "stage": 0,
            "numel": [master.numel() for master in masters],
            "base_dtype": str(self.low_precision_dtype).removeprefix("torch."),
            "formats": self.optimizer.formats(),
            "names": [self.fp8_engine.param_names.get(master, "") for master in masters],
        }

    def state_dict(self) -> dict[str, Any]:
        state = write_state(self)
        state[KEY] = codes_state(self.optimizer, self.fp8_masters, self.fp8_layout())
        return state

    def load_state_dict(self, state_dict: dict[str, Any], load_optimizer_states: bool = True) -> None:
        """Any of DeepSpeed's stage 0 forms; exact codes where they fit."""
        loaded: Loaded = read_state(self, state_dict)
        loaded.apply(self, load_optimizer_states)
        if load_optimizer_states and loaded.has_moments:
            load_codes(self.optimizer, self.fp8_masters, state_dict.get(KEY), self.fp8_layout())
