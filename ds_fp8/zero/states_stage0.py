"""Stage 0: no partition, no fp32 copy; every rank steps every parameter in place.

Without ZeRO DeepSpeed wraps a bf16 or fp16 job's optimizer into one that clones all weights to fp32. Here the
optimizer's parameters *are* the model's: its 16-bit value is the upper half of its master, the rest lies in the state.
What DeepSpeed does around the step (overflow, norm, clip, loss scale) is inherited or repeated number for number.

fp16 in stage 0 needs a repair. Since 0.18.4 `engine.backward` scales the loss for ZeRO's optimizers only, but this
wrapper still divides the gradients by the loss scale, so updates come out 2^16 too small. `LossScaleAdapter` takes the
place of the GradScaler that the engine keeps for torch.autocast, and scales the loss as DeepSpeed did before. (Older
releases call the optimizer's `backward`, which does the same.) The loss scale is our own, with DeepSpeed's arithmetic.

Rounding draws the same bits on all ranks, because replicas must stay equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from deepspeed.moe.utils import split_params_grads_into_shared_and_expert_params
from deepspeed.runtime.utils import CheckOverflow, get_global_norm, get_weight_norm
from torch import Tensor

from .states import KEY, load_quantized, quantized_state
from .states_stage0_formats import Loaded, read_state, write_state
from .states_stage0_scale import LossScale, is_invalid_norm
from .touched import touched

if TYPE_CHECKING:
    from .adapters.vocabulary import Stage0 as Base
else:
    Base = object

TOUCHED = {
    "Engine": touched(reads="param_names"),
    "Stage0": touched(
        overrides="backward load_state_dict loss_scale refresh_fp32_params state_dict step",
        reads=(
            "_global_grad_norm clip_grad custom_loss_scaler external_loss_scale fp16_groups loss_scale_config "
            "low_precision_dtype mpu optimizer overflow overflow_checker zero_grad"
        ),
        writes=(
            "_global_grad_norm clip_grad custom_loss_scaler external_loss_scale fp16_groups fp32_groups "
            "fused_lamb_legacy loss_scale_config low_precision_dtype mpu norm_type optimizer overflow overflow_checker "
            "verbose"
        ),
    ),
}


class LossScaleAdapter:
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


class Stage0Optimizer(Base):
    """Mixin that makes an `FP16_UnfusedOptimizer` for every base dtype, with the model's parameters in place of fp32
    copies.

    layout  form of the fp32 part of checkpoints: that of the wrapper which DeepSpeed would have chosen without us
            (`fused`, `unfused`, or `bare` for an fp32 base)
    """

    layout: str

    def __init__(self, optimizer: Any, engine: Any, *, loss_scale: LossScale, clip_grad: float, mpu: Any, layout: str):
        self.optimizer = optimizer
        self.fp8_engine = engine
        self.layout = layout
        self.fused_lamb_legacy = False
        self.loss_scale_config = loss_scale
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
            group["params"] = [param for param in group["params"] if param.requires_grad and param.numel()]
            self.fp16_groups.append(group["params"])
        # The same objects: whoever walks DeepSpeed's fp32 copies meets the model's parameters.
        self.fp32_groups = self.fp16_groups
        self.low_precision_dtype = self.fp16_groups[0][0].dtype
        if self.low_precision_dtype == torch.float32:
            self._global_grad_norm = None  # clipped by the engine, which reports no norm for it
        self.overflow_checker = CheckOverflow(self.fp16_groups, mpu=mpu, deepspeed=engine)
        if self.low_precision_dtype == torch.float16:
            self.fp8_scale_losses(LossScaleAdapter(self))

    @property
    def fp8_masters(self) -> list[Tensor]:
        """All parameters, group by group."""
        return [param for group in self.fp16_groups for param in group]

    @property
    def loss_scale(self) -> float:
        return self.external_loss_scale if self.custom_loss_scaler else self.loss_scale_config.cur_scale

    cur_scale = loss_scale

    def backward(self, loss: Tensor, create_graph: bool = False, retain_graph: bool = False) -> None:
        """As the engine of older releases calls it."""
        scaled = loss.float() * self.loss_scale if self.low_precision_dtype == torch.float16 else loss
        scaled.backward(create_graph=create_graph, retain_graph=retain_graph)

    def step(self, closure: Any = None) -> bool:
        if self.low_precision_dtype == torch.float32:
            # An fp32 job: the engine has clipped already and checks nothing.
            self.optimizer.grad_scale = 1.0
            self.optimizer.step()
            self.fp8_stepped()
            return False
        self.overflow = self.overflow_checker.check()
        if self.overflow:
            return self._skip()
        norms = []
        for group in self.fp16_groups:
            grads, _ = split_params_grads_into_shared_and_expert_params(group)
            norms.append(get_weight_norm(grads, mpu=self.mpu) if grads else 0.0)
        self._global_grad_norm = get_global_norm(norm_list=norms)
        if is_invalid_norm(self._global_grad_norm):
            return self._skip()
        scaled_norm = self._global_grad_norm
        # Before the loss scale moves: these gradients were made with the present one.
        scale = self.loss_scale_config.cur_scale
        self.optimizer.grad_scale = 1.0 / self.loss_scale_config.combined(scaled_norm, self.clip_grad)
        self._global_grad_norm = scaled_norm / scale
        self.loss_scale_config.update(overflow=False)
        self._fill_missing_gradients()
        self.optimizer.step()
        self.fp8_stepped()
        return self.overflow

    def _fill_missing_gradients(self) -> None:
        """A parameter without gradient (frozen in mid-run) has gradient zero, as in DeepSpeed's wrappers and in every
        ZeRO stage: its momentum and its decay go on. torch's own Adam, and so DeepSpeed with fp32, leaves it alone.
        """
        for param in self.fp8_masters:
            if param.grad is None:
                param.grad = torch.zeros_like(param)

    def _skip(self) -> bool:
        """No update from gradients that are not finite; a dynamic loss scale goes down."""
        self.overflow = True
        self._global_grad_norm = float("inf")
        self.loss_scale_config.update(overflow=True)
        self.zero_grad(set_to_none=True)
        return True

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
        state[KEY] = quantized_state(self.optimizer, self.fp8_masters, self.fp8_layout())
        return state

    def load_state_dict(self, state_dict: dict[str, Any], load_optimizer_states: bool = True) -> None:
        """Any of DeepSpeed's stage 0 forms; exact quantized values where they fit."""
        loaded: Loaded = read_state(self, state_dict)
        loaded.apply(self, load_optimizer_states)
        if load_optimizer_states and loaded.has_moments:
            load_quantized(self.optimizer, self.fp8_masters, state_dict.get(KEY), self.fp8_layout())
