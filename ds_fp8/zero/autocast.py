"""DeepSpeed's `torch_autocast` section: parameters keep the dtype in which they travel.

DeepSpeed marks parameters for the 16-bit wire by the *exact* class of their module (0.17.2 to 0.19.8,
runtime/torch_autocast.py), and looks after the swap: an Fp8Linear is no nn.Linear to it, so its gradients, and in
stage 3 its gathers, would go in fp32. So DeepSpeed's own function looks at the model before the swap as well. The
marks hang on the Parameters, which FP8 layers keep; the second look adds what was not swapped.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime import torch_autocast

from .touched import touched

TOUCHED = {
    "Engine": touched(reads="torch_autocast_dtype torch_autocast_enabled torch_autocast_lower_precision_safe_modules"),
}


class _BeforeSwap:
    """The engine, with the model that it is about to wrap: `engine.module` is set later."""

    def __init__(self, engine: Any, model: Any):
        self.engine = engine
        self.module = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def parameters(self) -> Any:
        return self.module.parameters()


def mark_comm_dtypes(engine: Any, model: Any) -> None:
    """Mark the parameters of `model`, whose layers are still unmodified; nothing without `torch_autocast`."""
    if engine.torch_autocast_enabled():
        torch_autocast.init_autocast_params(
            _BeforeSwap(engine, model),
            engine.torch_autocast_dtype(),
            engine.torch_autocast_lower_precision_safe_modules(),
        )
