"""Our own words for what releases of DeepSpeed do differently; here as the newest release means them.

fp8_adapt           called once, when the class has been changed
fp8_shrink_masters  makes masters that DeepSpeed has built in fp32 those of the base dtype
fp8_undivided       a block in which `average_tensor` hands on sums instead of means (ZeRO 1 and 2)
fp8_stepped         called after each step (stage 0)
fp8_scale_losses    lets `engine.backward` scale the loss (stage 0)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..touched import touched

if TYPE_CHECKING:
    from .. import deepspeed_wrappers as deepspeed
else:
    deepspeed = SimpleNamespace(ZeroStage12=object, ZeroStage3=object, Bf16=object, Stage0=object)

TOUCHED = {
    "Engine": touched(writes="torch_autocast_z0_gradscaler"),
    "ZeroStage12": touched(writes="gradient_average"),
}


class Adapted:
    """What every wrapper understands."""

    def fp8_adapt(self) -> None:
        """The newest release needs nothing."""

    def fp8_shrink_masters(self) -> None:
        """They have the base dtype: `_configure_master_weights` was told so (`specializing.base_dtype_masters`)."""


class ZeroStage12(Adapted, deepspeed.ZeroStage12):
    """Over `DeepSpeedZeroOptimizer`."""

    @contextmanager
    def fp8_undivided(self) -> Iterator[None]:
        self.gradient_average = False
        try:
            yield
        finally:
            self.gradient_average = True


class ZeroStage3(Adapted, deepspeed.ZeroStage3):
    """Over `DeepSpeedZeroOptimizer_Stage3`."""


class Bf16(Adapted, deepspeed.Bf16):
    """Over `BF16_Optimizer`."""


class Stage0(Adapted, deepspeed.Stage0):
    """Over our `Stage0Optimizer`."""

    fp8_engine: Any

    def fp8_scale_losses(self, scaler: Any) -> None:
        """`engine.backward` scales the loss of ZeRO's optimizers only, and that of torch.autocast's GradScaler."""
        self.fp8_engine.torch_autocast_z0_gradscaler = scaler

    def fp8_stepped(self) -> None:
        """The engine clears the gradients."""
