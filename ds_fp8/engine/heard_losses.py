"""The loss of each micro-batch, heard as it comes to `engine.backward`; a script that goes without it has none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..zero.touched import touched

TOUCHED = {"Engine": touched(reads="backward")}


def hear_losses(engine: Any, note: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    """Call `note` with each loss of one element, detached [], before its backward; the result ends that."""
    own = vars(engine)
    before, backward = own.get("backward"), engine.backward

    @functools.wraps(backward)
    def noting_backward(loss: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            note(loss.detach().reshape(()))
        return backward(loss, *args, **kwargs)

    def stop() -> None:
        if own.get("backward") is noting_backward:  # else somebody has wrapped it since, and keeps what he has
            del own["backward"]
            if before is not None:
                own["backward"] = before

    own["backward"] = noting_backward
    return stop
