"""0.18.5 and before: nobody clears the gradients of a bf16 job in stage 0, so each step would see those of all before it."""

from __future__ import annotations

from typing import Any

from ..touched import touched

TOUCHED = {"Stage0": touched(reads="zero_grad")}


class Stage0:
    """Over our `Stage0Optimizer`."""

    def fp8_stepped(self: Any) -> None:
        self.zero_grad(set_to_none=True)
