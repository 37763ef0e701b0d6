"""0.18.5 and before: nobody clears the gradients of a bf16 job in stage 0, so each step would see those of all
before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..touched import touched

if TYPE_CHECKING:
    from .vocabulary import Stage0 as Base
else:
    Base = object

TOUCHED = {"Stage0": touched(reads="zero_grad")}


class Stage0(Base):
    """Over our `Stage0Optimizer`."""

    def fp8_stepped(self) -> None:
        self.zero_grad(set_to_none=True)
