"""One call at a time of Transformer Engine's layers.

Its autocast is one switch of the process, and its layers keep their quantizers and a weight's workspace in themselves,
as ours keep the slots of a call. So two threads that call layers at once (an evaluation beside the training, several
requests) would cast with one another's scales, or find the workspace gone. A backward reads nothing of that.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

_lock = threading.RLock()


def serial(forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    @functools.wraps(forward)
    def alone(self: Any, input: torch.Tensor) -> torch.Tensor:
        with _lock:
            return forward(self, input)

    return alone
